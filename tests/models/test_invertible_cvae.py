"""The Invertible CVAE: against its eager twin and FrEIA, widths bridged, words defined, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lmvae_fast as lf
from lmvae_fast.data.word_vectors import EncoderVectors, TokenEmbeddingVectors, WordVectors
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.models.bridge import Bridge
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.invertible_cvae import BaseDensity, InvertibleCVAE, build_flow
from lmvae_fast.reference.invertible_cvae import ReferenceBlock, ReferenceInvertibleCVAE, principal_components
from lmvae_fast.testing import make_model

SMALL = {"blocks": 3, "hidden": (10,)}
KINDS = ("coupling", "allinone", "glow")
WORDS = ["cat", "star", "water", "plant", "moon", "stone", "light", "food", "ice", "sun", "planet", "animal"]


@pytest.fixture(scope="module")
def vae():
    return make_model(max_len=12).eval()


def table(dim: int, words=WORDS, seed: int = 0) -> WordVectors:
    return WordVectors(list(words), np.random.default_rng(seed).normal(size=(len(words), dim)).astype(np.float32))


def definitions(words=WORDS) -> lf.DefinitionDataset:
    glosses = [f"{word} is a kind of {WORDS[(i * 5) % len(WORDS)]}" for i, word in enumerate(words)]
    return lf.DefinitionDataset(list(words), glosses, ["n" if i % 3 else "v" for i in range(len(words))])


def fitted(vae, dim: int = 6, **config) -> InvertibleCVAE:
    """A model whose bridge is settled, with an untrained flow away from its initialisation."""
    torch.manual_seed(0)
    model = InvertibleCVAE(vae, lf.FlowConfig(**{**SMALL, **config}), vectors=table(dim))
    model.set_width(dim).fit(torch.from_numpy(table(dim).vectors))
    with torch.no_grad():
        model.flow.theta.add_(0.05 * torch.randn_like(model.flow.theta))
    return model


# ---- against the eager twin ------------------------------------------------------------------------------------------


def twin_of(flow, config: lf.FlowConfig, dtype=torch.float32):
    """The eager twin of a flow, and pairs (our view of a gradient, the twin's parameter)."""
    dim, views = flow.spec.dim, flow.named_views()
    stages = 2 if config.kind == "glow" else 1
    blocks, matched = [], []
    for b in range(config.blocks):
        at = f"stages.{(b + 1) * stages - 1}."
        index = views[at + "index"].long() if config.permutation == "hard" else torch.arange(dim)
        options = {"cond_dim": flow.spec.cond_dim, "activation": config.activation}
        block = ReferenceBlock(config.kind, dim, config.hidden, index, **options)
        nets = [net for net in (block.of_first, block.of_second) if net is not None]
        for i, net in enumerate(nets):
            stage = b * stages + (i if stages == 2 else 0)
            for k, linear in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
                matched.append((f"stages.{stage}.subnets.0.{k}.weight", linear.weight, lambda t: t.t()))
                matched.append((f"stages.{stage}.subnets.0.{k}.bias", linear.bias, None))
        # Our coupling block has its ActNorm before the permutation, by the same numbers in another order.
        order = (lambda t, index=index: t[index]) if config.kind == "coupling" else None
        matched.append((at + "scale", block.raw_scale, order))
        matched.append((at + "offset", block.offset, order))
        blocks.append(block)
    with torch.no_grad():
        for name, parameter, change in matched:
            parameter.copy_(views[name] if change is None else change(views[name]))
    return ReferenceInvertibleCVAE(blocks).to(dtype), matched


def losses(kind: str, x, mu, logvar):
    """(our loss of (z, logdet), the twin's loss of itself) for each base density."""
    centres = mu[:1].expand_as(mu)
    ours = {
        "posterior": BaseDensity.gaussian(mu, logvar),
        "standard": BaseDensity.gaussian(torch.zeros_like(mu), torch.zeros_like(mu)),
        "cluster": BaseDensity.gaussian(centres, torch.full_like(mu, math.log(0.4))),
    }[kind]
    theirs = {
        "posterior": lambda twin, c: twin.posterior_loss(x, mu, torch.exp(0.5 * logvar), c),
        "standard": lambda twin, c: twin.standard_loss(x, c),
        "cluster": lambda twin, c: twin.cluster_loss(x, centres, c),
    }[kind]
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base", "dim", "options"),
    [
        ("posterior", 6, {}),
        ("posterior", 7, {"conditions": ("n", "v"), "activation": "gelu"}),
        ("standard", 9, {"permutation": "none", "hidden": (10, 7)}),
        ("cluster", 6, {}),
    ],
)
def test_loss_and_every_gradient_equal_the_twins(kind, base, dim, options):
    torch.manual_seed(0)
    config = lf.FlowConfig(kind=kind, **{**SMALL, **options})
    flow = build_flow(config, dim)
    with torch.no_grad():
        flow.theta.add_(0.1 * torch.randn_like(flow.theta))
    twin, matched = twin_of(flow, config)
    x, mu, logvar = torch.randn(9, dim), torch.randn(9, dim), 0.5 * torch.randn(9, dim)
    c = torch.eye(2)[torch.arange(9) % 2] if config.conditions else None
    ours, theirs = losses(base, x, mu, logvar)
    loss = ours.nll(*flow(x, c)).mean()
    want = theirs(twin, c)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    loss.backward()
    want.backward()
    grads = {slot.name: slot.view(flow.theta.grad) for slot in flow.spec.slots[0]}
    assert len(matched) == len(grads)
    total = flow.theta.grad.norm()
    for name, parameter, change in matched:
        got = grads[name] if change is None else change(grads[name])
        assert (got - parameter.grad).norm() <= 1e-5 * total, name


def test_the_sister_block_is_freias():
    """Swap the halves, FrEIA's one-sided coupling with the identity as its clamp, swap back, permutation, ActNorm."""
    Ff, Fm = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    torch.manual_seed(0)
    dim, config = 8, lf.FlowConfig(**SMALL)
    flow = build_flow(config, dim)
    with torch.no_grad():
        flow.theta.add_(0.1 * torch.randn_like(flow.theta))
    views, inn = flow.named_views(), Ff.SequenceINN(dim)
    swap = torch.arange(dim).roll(dim // 2)
    for b in range(config.blocks):
        at = f"stages.{b}."
        index = views[at + "index"].long()
        options = {"subnet_constructor": lambda i, o: nn.Sequential(nn.Linear(i, 10), nn.ReLU(), nn.Linear(10, o))}
        for cls, arguments in ((Fm.PermuteRandom, {"seed": 1}), (Fm.AffineCouplingOneSided, options | {
            "clamp": 1.0, "clamp_activation": nn.Identity()}), (Fm.PermuteRandom, {"seed": 1}), (Fm.ActNorm, {})):  # fmt: skip
            inn.append(cls, **arguments)
        into, one_sided, out, norm = list(inn.module_list)[-4:]
        for module, perm in ((into, swap), (out, swap[index])):
            module.perm.data, module.perm_inv.data = perm, perm.argsort()
        norm.init_on_next_batch = False
        with torch.no_grad():
            for k, linear in ((0, one_sided.subnet[0]), (1, one_sided.subnet[2])):
                linear.weight.copy_(views[f"{at}subnets.0.{k}.weight"].t())
                linear.bias.copy_(views[f"{at}subnets.0.{k}.bias"])
            norm.scale.copy_(views[at + "scale"][index][None])
            norm.bias.copy_(views[at + "offset"][index][None])
    x = torch.randn(11, dim)
    for got, want in zip(flow(x), inn(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    z = torch.randn(11, dim)
    for got, want in zip(flow.inverse(z), inn(z, rev=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_base_density_is_the_normal_distributions():
    mu, logvar, z = torch.randn(3, 5, 4).double()
    logdet = torch.randn(5).double()
    want = -torch.distributions.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z).sum(1) - logdet
    torch.testing.assert_close(BaseDensity.gaussian(mu, logvar).nll(z, logdet), want)


# ---- widths ----------------------------------------------------------------------------------------------------------


def test_pca_projects_on_the_principal_components():
    x = torch.randn(40, 9).double() @ torch.randn(9, 9).double()
    bridge = Bridge.of_kind("auto", 9, 4).double()
    assert bridge.kind == "pca"
    bridge.fit(x)
    mean, directions = principal_components(x, 4)
    projector = directions @ directions.T
    torch.testing.assert_close(bridge.matrix @ bridge.matrix.T, projector)
    torch.testing.assert_close(bridge(x) @ bridge.matrix.T, (x - mean) @ projector)
    variance = torch.linalg.svdvals(x - mean).square()
    assert float(bridge.explained) == pytest.approx(float(variance[:4].sum() / variance.sum()), rel=1e-6)
    again = Bridge.of_kind("pca", 9, 4).double()
    again.fit(x.flip(0))  # the signs do not depend on the rows' order
    torch.testing.assert_close(again.matrix, bridge.matrix)
    with pytest.raises(DataError, match="span fewer dimensions"):
        Bridge.of_kind("pca", 9, 4).double().fit(x[:3])


def test_padding_keeps_the_vector_and_adds_noise_only_while_fitting():
    bridge = Bridge.of_kind("auto", 3, 5, noise=0.5)
    x, noise = torch.randn(4, 3), torch.randn(4, 2)
    assert torch.equal(bridge(x), torch.cat([x, torch.zeros(4, 2)], 1))
    assert torch.equal(bridge(x, noise), torch.cat([x, 0.5 * noise], 1))


@pytest.mark.parametrize(("kind", "dim_in", "dim_out"), [("none", 3, 4), ("pca", 3, 4), ("pad", 4, 3), ("pca", 4, 4)])
def test_widths_that_do_not_fit(kind, dim_in, dim_out):
    with pytest.raises(ConfigError, match=f"width {dim_in} do not reach latents of width {dim_out}"):
        Bridge.of_kind(kind, dim_in, dim_out)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_of_every_base(vae):
    data = definitions()
    vectors = torch.from_numpy(table(6).vectors)
    posterior = Posterior(torch.randn(12, 6), torch.randn(12, 6))
    base = fitted(vae).pairs(data, vectors, posterior).base
    torch.testing.assert_close(base.mu, posterior.mu)
    torch.testing.assert_close(base.inv_sigma, torch.exp(-0.5 * posterior.logvar))
    base = fitted(vae, posterior_sigma=0.2).pairs(data, vectors, posterior).base
    torch.testing.assert_close(base.inv_sigma, torch.full((12, 6), 5.0))
    base = fitted(vae, base="standard").pairs(data, vectors, posterior).base
    assert float(base.mu.abs().sum()) == 0 and torch.equal(base.inv_sigma, torch.ones(12, 6))
    model = fitted(vae, base="cluster")
    base = model.pairs(data, vectors, posterior).base
    nouns = torch.tensor([pos == "n" for pos in data.pos])
    assert model.clusters == ("n", "v")
    torch.testing.assert_close(base.mu[1], posterior.mu[nouns].mean(0))
    torch.testing.assert_close(base.inv_sigma, torch.full((12, 6), 0.4**-0.5))
    other = lf.DefinitionDataset(["cat"], ["an animal"], ["r"])
    with pytest.raises(DataError, match=r"no cluster.*'r'"):
        model.pairs(other, vectors[:1], Posterior(posterior.mu[:1], posterior.logvar[:1]))
    with pytest.raises(DataError, match="needs a label for every definition"):
        model.pairs(
            lf.DefinitionDataset(["cat"], ["x"]), vectors[:1], Posterior(posterior.mu[:1], posterior.logvar[:1])
        )
    with pytest.raises(DataError, match="differ in number"):
        model.pairs(data, vectors[:3], posterior)


def test_posteriors_are_the_encoders(vae):
    glosses = definitions().glosses
    found, want = fitted(vae).posteriors(glosses, batch_size=5), vae.encode(glosses)
    torch.testing.assert_close(found.mu, want.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logvar, want.logvar, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="empty"):
        fitted(vae).posteriors(["a cat", " "])


# ---- words to glosses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [6, 9, 4])  # as wide as the latents, wider, narrower
def test_define_decodes_the_latent_of_the_words_vector(vae, dim):
    model = fitted(vae, dim)
    words = ["moon", "cat", "sun"]
    z = model.latents(model.vectors.lookup(words).vectors)
    assert z.shape == (3, 6) and not z.requires_grad
    want, _ = model.flow(model.bridge(torch.from_numpy(model.vectors.lookup(words).vectors)))
    torch.testing.assert_close(z, want.detach())
    assert model.define(words) == vae.decode(z)
    skipped = model.define(["moon", "cow", "sun"], missing="skip")
    assert skipped[1] is None and skipped[0] == model.define(["moon"])[0]
    drawn = model.define(["moon", "cat"], samples=3, seed=1)
    assert [len(texts) for texts in drawn] == [3, 3]
    with pytest.raises(DataError, match="'cow'"):
        model.define(["cow"])


def test_conditions(vae):
    model = fitted(vae, conditions=("n", "v"))
    vector = model.vectors.lookup(["cat"]).vectors
    assert not torch.equal(model.latents(vector, ["n"]), model.latents(vector, ["v"]))
    assert (
        model.define(["cow", "cat"], conditions=["n", "v"], missing="skip")[1]
        == vae.decode(model.latents(vector, ["v"]))[0]
    )
    for labels, message in ((None, "one label per word"), (["x"], "unknown condition")):
        with pytest.raises(DataError, match=message):
            model.latents(vector, labels)
    with pytest.raises(DataError, match="one per word"):
        model.define(["cat"], conditions=["n", "v"])
    with pytest.raises(DataError, match="has no conditions"):
        fitted(vae).latents(vector, ["n"])


def test_the_vaes_own_vectors(vae):
    for vectors in (EncoderVectors(vae.encoder), TokenEmbeddingVectors(vae.decoder)):
        model = fitted(vae, 6)
        model.bridge = None
        model.set_width(vectors.dim).fit(torch.from_numpy(vectors.lookup(WORDS).vectors))
        assert len(model.define(["galaxy"], vectors=vectors)) == 1


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_vectors(vae):
    model = fitted(vae)
    for bad, message in (
        (torch.zeros(6), "floating matrix"),
        (torch.zeros(2, 6, dtype=torch.int64), "int64"),
        (torch.full((2, 6), float("nan")), "NaN.*row 0"),
    ):
        with pytest.raises(DataError, match=message):
            model.latents(bad)
    with pytest.raises(ConfigError, match=r"another width.*5.*6"):
        model.latents(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="not fitted yet"):
        InvertibleCVAE(vae, lf.FlowConfig(**SMALL)).latents(torch.zeros(2, 6))
    model.vectors = None
    with pytest.raises(DataError, match="no word vectors"):
        model.define(["cat"])


def test_bad_construction(vae):
    with pytest.raises(ConfigError, match=r"dim 5.*latent_dim 6"):
        InvertibleCVAE(vae, lf.CouplingFlow(5, **SMALL))
    with pytest.raises(ConfigError, match="goes with a CouplingFlow"):
        InvertibleCVAE(vae, lf.FlowConfig(), lf.FlowConfig())
    with pytest.raises(ConfigError, match="conditioned on labels"):
        InvertibleCVAE(make_model(annotations=("V", "ARG0")))
    for bad in (
        {"kind": "rnvp"}, {"blocks": 0}, {"hidden": (0,)}, {"hidden": 5}, {"bridge": "lda"}, {"base": "prior"},
        {"pad_noise": 0.0}, {"clamp": 1.0}, {"posterior_sigma": 0.1, "base": "standard"}, {"conditions": ("a", "a")},
        {"cluster_variance": 0.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            lf.FlowConfig(**bad)
    with pytest.raises(ConfigError, match="no clamp"):
        lf.CouplingFlow(6, kind="coupling", clamp=1.0)


def test_vaes_that_no_flow_goes_with():
    """Prompts in place of texts; more or fewer latent dimensions than a flow has channels."""
    for bad, message in (
        (make_model(system="cvae", latent_dim=8), "prompts with responses cannot define words"),
        (make_model(latent_dim=1), r"latent_dim=1.*2 to 1024"),
        (make_model(latent_dim=1025), r"latent_dim=1025.*2 to 1024"),
        ("runs/vae", "there is no VAE.*str"),
    ):
        with pytest.raises(ConfigError, match=message):
            InvertibleCVAE(bad, lf.FlowConfig(**SMALL))
    for dim in (0, 1, 1025):
        with pytest.raises(ConfigError, match="2 to 1024"):
            build_flow(lf.FlowConfig(**SMALL), dim)


def test_values_of_other_kinds(vae):
    model = fitted(vae)
    for bad in (None, [[1.0], [1.0, 2.0]], [["a"]], object(), [[10**30]], np.array([None])):
        with pytest.raises(DataError, match="floating matrix"):
            model.latents(bad)
    for bad in (0, -1, 1.5, True, "2", None):
        with pytest.raises(ConfigError, match="samples is out of range"):
            model.define(["cat"], samples=bad)
    for bad in (None, 3, {"cat": 1}):
        with pytest.raises(DataError, match="come as a list"):
            model.define(bad)
    for bad in ("glove", np.eye(6)):
        with pytest.raises(DataError, match="cannot be looked up"):
            model.define(["cat"], vectors=bad)
        with pytest.raises(DataError, match="cannot be looked up"):
            InvertibleCVAE(vae, vectors=bad)
    for bad in ({"blocks": 3}, 3):
        with pytest.raises(ConfigError, match="what the flow is to be is unknown"):
            InvertibleCVAE(vae, bad)
    with pytest.raises(ConfigError, match="what the flow is to be is unknown"):
        InvertibleCVAE(vae, lf.CouplingFlow(6, **SMALL), lf.FlowTrainConfig())
