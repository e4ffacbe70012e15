"""Fitting a flow: it learns, resumes bit for bit, keeps its best, stops early, and refuses what it could only learn wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.data.word_vectors import WordVectors
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, NumericalError, OutputError
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.models.systems.invertible_cvae import BaseDensity, FlowPairs, InvertibleCVAE
from lmvae_fast.testing import SENTENCES, make_model
from lmvae_fast.training.callbacks import Callback
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.flow_data import bridged, check_not_collapsed, flow_figures
from lmvae_fast.training.flow_loop import FlowTrainer
from tests.training.helpers import StopAt, assert_same_checkpoint, assert_same_history

DIM = 6


@pytest.fixture(scope="module")
def vae():
    return make_model(max_len=12).eval()


def model_of(vae, seed: int = 0, **config) -> InvertibleCVAE:
    torch.manual_seed(seed)
    return InvertibleCVAE(vae, lf.FlowConfig(**{"blocks": 3, "hidden": (16,), **config}))


def pairs(width: int = DIM, count: int = 70, seed: int = 0, conditions: int = 0) -> FlowPairs:
    """Vectors whose base density depends on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    mix = torch.randn(width, DIM, generator=torch.Generator().manual_seed(99))
    codes = torch.eye(conditions)[torch.arange(count) % conditions] if conditions else None
    mu = torch.tanh(x @ mix) + (0 if codes is None else codes[:, :1])
    return FlowPairs(x, BaseDensity.gaussian(mu, torch.full_like(mu, -2.0)), codes)


def settings(folder: Path, **changes) -> lf.FlowTrainConfig:
    """A run of 15 steps (3 epochs of 5, the last batch of each smaller) with warm-up and a moving rate."""
    options = {
        "output_dir": str(folder), "epochs": 3, "batch_size": 16, "learning_rate": 0.01, "schedule": "cosine",
        "warmup_steps": 2, "log_every": 4, "eval_every": 5, "tensorboard": False, "progress": False,
    }  # fmt: skip
    return lf.FlowTrainConfig(**{**options, **changes})


def run(folder: Path, vae, *callbacks: Callback, width=DIM, config=None, evaluated=True, seed=0, **changes):
    """(the model, the result); `seed`: of a fresh model's random numbers, `changes`: of the settings."""
    model = model_of(vae, seed, **(config or {}))
    conditions = len(model.config.conditions)
    valid = pairs(width, 30, seed=1, conditions=conditions) if evaluated else None
    trainer = FlowTrainer(model, pairs(width, conditions=conditions), valid, settings(folder, **changes), callbacks)
    return model, trainer.run()


CASES = {
    "coupling": (DIM, {}),
    "glow, wider vectors": (9, {"kind": "glow"}),
    "allinone, narrower vectors": (4, {"kind": "allinone"}),
    "conditional": (DIM, {"conditions": ("n", "v"), "permutation": "soft"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_a_resumed_run_is_the_same(tmp_path, vae, case):
    width, config = CASES[case]
    whole_model, whole = run(tmp_path / "whole", vae, width=width, config=config, epochs=6)
    evaluations = [record["nll"] for record in whole.history if record["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0] - 0.5
    assert whole.stop_reason == "completed" and whole.step == 30 and whole.pairs == 6 * 70
    # Stopped twice, each time gone on with by a model with other random numbers: at the end of an epoch and within one.
    for stop, seed in ((10, 0), (17, 4)):
        run(tmp_path / "broken", vae, StopAt(stop), width=width, config=config, epochs=6, resume=True, seed=seed)
    model, resumed = run(tmp_path / "broken", vae, width=width, config=config, epochs=6, resume=True, seed=5)
    assert_same_checkpoint(resumed.checkpoint, whole.checkpoint)
    assert_same_history(tmp_path / "broken", tmp_path / "whole")
    x = pairs(width).vectors[:5]
    labels = ["n", "v", "n", "n", "v"] if config.get("conditions") else None
    assert torch.equal(model.latents(x, labels), whole_model.latents(x, labels))


def test_the_mean_nll_has_the_gradient_of_its_formula():
    base = pairs().base
    base = BaseDensity(*(part[:9].double() for part in (base.mu, base.inv_sigma, base.constant)))
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(9, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    logdet = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(base.mean_nll(z, logdet), base.nll(z, logdet).mean())
    ours = torch.autograd.grad(base.mean_nll(z, logdet), (z, logdet))
    for got, expected in zip(ours, torch.autograd.grad(base.nll(z, logdet).mean(), (z, logdet)), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(base.mean_nll, (z, logdet))


@pytest.mark.parametrize("clip", [0.05, 1e6, None])
def test_a_step_is_that_of_torchs_clipping_and_adamw(tmp_path, vae, clip):
    model = model_of(vae, 0)
    trainer = FlowTrainer(model, pairs(), None, settings(tmp_path, grad_clip=clip, warmup_steps=0, schedule="constant"))
    theta = torch.nn.Parameter(model.flow.theta.detach().clone())
    optimizer = torch.optim.AdamW([theta], lr=0.01, betas=(0.9, 0.999), weight_decay=trainer.config.weight_decay)
    rows = torch.arange(16)
    for _ in range(4):
        with torch.no_grad():
            theta.copy_(model.flow.theta)  # what rounding has parted is not to grow
        trainer.optimizer_step(rows)
        z, logdet = torch.func.functional_call(model.flow, {"theta": theta}, (trainer.train.vectors[rows],))
        trainer.train.base.select(rows).nll(z, logdet).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([theta], clip or float("inf"))
        assert clip is None or (float(norm) > clip) is (clip < 1)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.flow.theta.detach(), theta.detach(), rtol=1e-4, atol=2e-5)


def test_the_best_flow_is_kept_and_a_run_without_progress_stops(tmp_path, vae):
    model, result = run(tmp_path / "a", vae, epochs=40, learning_rate=0.2, schedule="constant", early_stop=3)
    assert result.stop_reason == "early_stop" and result.step < 200
    evaluations = [record for record in result.history if record["kind"] == "eval"]
    best = min(evaluations, key=lambda record: record["nll"])
    assert result.best["step"] == best["step"] < result.step and len(evaluations) - evaluations.index(best) == 4
    last, _ = run(tmp_path / "c", vae, epochs=40, learning_rate=0.2, schedule="constant", early_stop=3, keep_best=False)
    held = pairs(DIM, 30, seed=1)
    with torch.no_grad():
        z, logdet = last.flow(held.vectors)
    assert float(held.base.nll(z, logdet).mean()) == pytest.approx(evaluations[-1]["nll"], rel=1e-5)
    # Resuming what had ended ends at once, with the best flow.
    again, more = run(
        tmp_path / "a", vae, epochs=40, learning_rate=0.2, schedule="constant", early_stop=3, resume=True, seed=8
    )
    assert more.step == result.step and more.stop_reason == "early_stop"
    assert torch.equal(again.flow.theta, model.flow.theta)


def test_validation_is_the_nll_in_nats(tmp_path, vae):
    model, result = run(tmp_path / "run", vae, keep_best=False)
    held = pairs(DIM, 30, seed=1)
    with torch.no_grad():
        z, logdet = model.flow(held.vectors)
    density = torch.distributions.Normal(held.base.mu, 1 / held.base.inv_sigma)
    want = float((-density.log_prob(z).sum(1) - logdet).mean())
    record = [record for record in result.history if record["kind"] == "eval"][-1]
    assert record["nll"] == pytest.approx(want, rel=1e-5) and record["nll_per_dim"] == pytest.approx(
        want / DIM, rel=1e-5
    )
    assert record["mse"] == pytest.approx(float((z - held.base.mu).square().mean()), rel=1e-5)


def test_actnorm_starts_from_the_data(tmp_path, vae):
    """Before the first step every channel leaves the flow with mean 0 and deviation 1; without it, scale 1 and offset 0."""
    for initialize in (True, False):
        model = model_of(vae)
        FlowTrainer(model, pairs(), None, settings(tmp_path / str(initialize), initialize=initialize))
        z, _ = model.flow(pairs().vectors)
        starts = torch.allclose(z.mean(0), torch.zeros(DIM), atol=1e-5) and torch.allclose(
            z.std(0), torch.ones(DIM), atol=1e-4
        )
        assert starts == initialize


def test_what_pads_is_noise_while_fitting_and_the_same_at_every_evaluation(tmp_path, vae):
    """Columns that are always zero would let the log-determinant, and with it the likelihood, rise for ever."""
    model = model_of(vae, pad_noise=0.3)
    trainer = FlowTrainer(model, pairs(2, 500), pairs(2, 30, seed=1), settings(tmp_path / "run"))
    padded = bridged(model, trainer.train.vectors)
    assert torch.equal(padded[:, :2], trainer.train.vectors)
    torch.testing.assert_close(padded[:, 2:].std(0), torch.full((4,), 0.3), rtol=0.15, atol=0)
    state = torch.get_rng_state()
    assert flow_figures(model, trainer.valid) == flow_figures(model, trainer.valid)
    assert flow_figures(model, trainer.valid) != flow_figures(model, trainer.valid, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_from_definitions(tmp_path, vae):
    words = [f"w{i}" for i in range(len(SENTENCES))]
    vectors = WordVectors([*words[:-1], "extra"], np.random.default_rng(0).normal(size=(8, DIM)).astype(np.float32))
    data = lf.DefinitionDataset([*words, words[0]], [*SENTENCES, "a second gloss of it"])
    model = model_of(vae)
    with pytest.raises(DataError, match="'w7'"):
        model.fit(data, vectors, config=settings(tmp_path / "run", eval_every=None))
    result = model.fit(data, vectors, valid=data[:4], config=settings(tmp_path / "run"), missing="skip")
    assert result.skipped == 1 and result.step == 3 and model.vectors is vectors
    assert len(model.define(["w0", "extra"])) == 2
    assert list((tmp_path / "run" / "cache").glob("posteriors-*"))
    again = model_of(vae, seed=4)
    assert (
        again.fit(data, vectors, valid=data[:4], config=settings(tmp_path / "run", resume=True), missing="skip").step
        == 3
    )
    assert torch.equal(again.flow.theta, model.flow.theta)
    with pytest.raises(OutputError, match="already holds"):
        model_of(vae).fit(data, vectors, config=settings(tmp_path / "run"), missing="skip")
    other = make_model(max_len=12, seed=3).eval()
    with pytest.raises(CheckpointError, match="another model"):
        model_of(other).fit(
            data, vectors, valid=data[:4], config=settings(tmp_path / "run", resume=True), missing="skip"
        )
    with pytest.raises(DataError, match="other training"):
        model_of(vae).fit(data[:3], vectors, valid=data[:4], config=settings(tmp_path / "run", resume=True))
    with pytest.raises(DataError, match="no word vectors"):
        model_of(vae).fit(data)


def test_a_collapsed_vae_is_refused_before_training(tmp_path):
    vae = make_model(max_len=12).eval()
    with torch.no_grad():
        vae.posterior_head.weight.zero_()
    words = ["cat", "sun", "ice"]
    vectors = WordVectors(words, np.eye(3, DIM, dtype=np.float32))
    data = lf.DefinitionDataset(words, list(SENTENCES[:3]))
    with pytest.raises(DataError, match=r"collapsed.*KL 0 nats, 0 of 6 dimensions active"):
        model_of(vae).fit(data, vectors, config=settings(tmp_path / "run"))
    assert not checkpoint.complete(tmp_path / "run" / "checkpoints")
    # One active dimension is enough; a base density that is no posterior does not ask.
    mu = torch.zeros(9, 4)
    mu[::2, 3] = 1.0
    check_not_collapsed(Posterior(mu, torch.zeros(9, 4)))
    # The prior, one density for all, nearly the prior.
    for mean, logvar in ((0.1 * mu, 0.0), (torch.ones(9, 4), 0.0), (0.15 * mu, 0.1)):
        with pytest.raises(DataError, match="collapsed"):
            check_not_collapsed(Posterior(mean, torch.full((9, 4), logvar)))
    standard = model_of(vae, base="standard", bridge="none")
    torch.manual_seed(0)
    wide = WordVectors(words, np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32))
    assert standard.fit(data, wide, config=settings(tmp_path / "standard", max_steps=1)).step == 1


def test_what_is_not_finite_stops_the_run_with_a_good_checkpoint(tmp_path, vae):
    with pytest.raises(NumericalError, match=r"step \d+.*clamped kind.*step-") as caught:
        run(
            tmp_path / "run", vae, learning_rate=1e4, grad_clip=None, schedule="constant", save_every=1, evaluated=False
        )
    error = caught.value
    assert f"step {error.step} " in str(error) and error.rows and str(error.checkpoint) in str(error)
    found = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert found is not None and torch.isfinite(found.tensors["model"]["flow.theta"]).all()


def test_bad_settings(tmp_path, vae):
    with pytest.raises(ConfigError, match="valid=None"):
        run(tmp_path, vae, evaluated=False, early_stop=2)
    with torch.no_grad(), pytest.raises(ConfigError, match="needs gradients"):
        run(tmp_path, vae)
    run(tmp_path / "run", vae, StopAt(2))
    with pytest.raises(ConfigError, match="recipe"):
        run(tmp_path / "run", vae, resume=True, learning_rate=0.02)
    with pytest.raises(ConfigError, match="do not reach"):
        run(tmp_path / "other", vae, width=9, config={"bridge": "none"})
    for bad in (
        {"learning_rate": 0.0}, {"batch_size": 0}, {"schedule": "step"}, {"keep_best": "yes"}, {"adam_betas": (1.0, 0.9)},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            lf.FlowTrainConfig(**bad)


def test_progress_bar_and_tensorboard(tmp_path, vae, capfd):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", vae, progress=True, tensorboard=True)
    assert "eval_nll" in capfd.readouterr().err
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def words_and_vectors(count: int, width: int = DIM) -> tuple[list[str], WordVectors]:
    words = [f"w{i}" for i in range(count)]
    return words, WordVectors(words, np.random.default_rng(0).normal(size=(count, width)).astype(np.float32))


def test_skipped_are_those_of_the_training_part(tmp_path, vae):
    words, vectors = words_and_vectors(4)
    data = lf.DefinitionDataset(words, list(SENTENCES[:4]))
    valid = lf.DefinitionDataset([*words[:2], "none"], list(SENTENCES[:3]))
    options = {"config": settings(tmp_path / "a", max_steps=1), "missing": "skip"}
    assert model_of(vae).fit(data, vectors, valid=valid, **options).skipped == 0
    options["config"] = settings(tmp_path / "b", max_steps=1)
    assert model_of(vae).fit(valid, vectors, valid=valid, **options).skipped == 1


def test_glosses_that_do_not_differ_are_no_collapse(tmp_path, vae):
    words, vectors = words_and_vectors(3)
    for data in (lf.DefinitionDataset(words, [SENTENCES[0]] * 3), lf.DefinitionDataset(words[:1], [SENTENCES[0]])):
        with pytest.raises(DataError, match=r"glosses do not differ.*1 distinct gloss in [13]") as caught:
            model_of(vae).fit(data, vectors, config=settings(tmp_path / "run"))
        assert "collapsed" not in str(caught.value)
    assert model_of(vae, base="standard").fit(
        lf.DefinitionDataset(words, [SENTENCES[0]] * 3), vectors, config=settings(tmp_path / "run", max_steps=1)
    )


@pytest.mark.parametrize(
    ("config", "labels", "held", "message"),
    [
        ({"bridge": "pca"}, "nvn", "nvn", "do not reach"),
        ({"conditions": ("n", "v")}, "nvr", "nvn", "unknown condition.*'r'"),
        ({"conditions": ("n", "v")}, "nvn", "nvr", "unknown condition.*'r'"),
        ({"conditions": ("n", "v")}, None, "nvn", "one label per word"),
        ({"base": "cluster"}, None, "nvn", "needs a label for every definition"),
        ({"base": "cluster"}, "nvn", "nvr", "no cluster.*'r'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_a_gloss_is_encoded(
    tmp_path, vae, monkeypatch, config, labels, held, message
):
    words, vectors = words_and_vectors(3)
    data, valid = (
        lf.DefinitionDataset(words, list(SENTENCES[:3]), None if pos is None else list(pos)) for pos in (labels, held)
    )
    model = model_of(vae, **config)
    monkeypatch.setattr(InvertibleCVAE, "posteriors", lambda *_, **__: pytest.fail("glosses were encoded"))
    with pytest.raises((ConfigError, DataError), match=message):
        model.fit(data, vectors, valid=valid, config=settings(tmp_path / "run"))
    assert model.bridge is None and model.clusters == () and model.vectors is None


def test_a_second_fit_starts_from_its_own_data(tmp_path, vae):
    words, narrow = words_and_vectors(4, 4)
    first = lf.DefinitionDataset(words, list(SENTENCES[:4]), list("nvnv"))
    second = lf.DefinitionDataset(words, list(SENTENCES[4:8]), list("aarr"))
    model, fresh = model_of(vae, base="cluster"), model_of(vae, base="cluster")
    model.fit(first, narrow, config=settings(tmp_path / "a", max_steps=1))
    assert model.clusters == ("n", "v") and model.bridge.kind == "pad"
    six = words_and_vectors(4, DIM)[1]
    model.fit(second, six, config=settings(tmp_path / "b", max_steps=1))
    fresh.fit(second, six, config=settings(tmp_path / "c", max_steps=1))
    assert model.clusters == fresh.clusters == ("a", "r") and model.bridge.kind == "none"
    assert torch.equal(model.centres, fresh.centres)
    # One that is refused leaves the fit before.
    with pytest.raises(OutputError, match="already holds"):
        model.fit(first, narrow, config=settings(tmp_path / "b", max_steps=1))
    assert model.clusters == ("a", "r") and torch.equal(model.centres, fresh.centres)
    assert model.bridge.dim_in == DIM and model.vectors is six


def test_the_posteriors_of_a_vae_that_is_set_otherwise_are_others(tmp_path):
    """Two VAEs of equal weights share a cache, and a run; their posteriors and the run are not shared."""
    vae, other = (make_model(max_len=12, pooling=pooling).eval() for pooling in ("mean", "cls"))
    words, vectors = words_and_vectors(4)
    data = lf.DefinitionDataset(words, list(SENTENCES[:4]))
    options = {"cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    model_of(vae).fit(data, vectors, config=settings(tmp_path / "a", **options))
    model_of(other).fit(data, vectors, config=settings(tmp_path / "b", **options))
    assert len(list((tmp_path / "cache").glob("posteriors-*"))) == 2
    model_of(vae, base="standard").fit(data, vectors, config=settings(tmp_path / "c", **options))
    with pytest.raises(CheckpointError, match=r"another VAE.*pooling='cls'"):
        model_of(other, base="standard").fit(
            data, vectors, config=settings(tmp_path / "c", **{**options, "max_steps": 4}, resume=True)
        )


def test_what_is_fitted_to_what(tmp_path, vae):
    words, vectors = words_and_vectors(3)
    data = lf.DefinitionDataset(words, list(SENTENCES[:3]))
    config = settings(tmp_path / "run", max_steps=1)
    for bad in ([("cat", "x")], None, "cat", {"cat": "x"}):
        with pytest.raises(DataError, match=r"fitted to definitions.*from_pairs"):
            model_of(vae).fit(bad, vectors, config=config)
    with pytest.raises(DataError, match="fitted to definitions"):
        model_of(vae).fit(data, vectors, valid=[("cat", "x")], config=config)
    for bad in (lf.TrainConfig(), {"max_steps": 1}, 0):
        with pytest.raises(ConfigError, match="FlowTrainConfig"):
            model_of(vae).fit(data, vectors, config=bad)
    with pytest.raises(DataError, match="cannot be looked up"):
        model_of(vae).fit(data, "glove", config=config)
    assert not (tmp_path / "run").exists()
