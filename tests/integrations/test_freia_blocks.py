"""FrEIA's blocks by their own names: values, log-determinants and gradients of the real ones, in one call of coupling_flow."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations import freia
from lmvae_fast.integrations.freia import framework as ours_f
from lmvae_fast.integrations.freia import fused
from lmvae_fast.integrations.freia import modules as ours_m

Ff = pytest.importorskip("FrEIA.framework")
Fm = pytest.importorskip("FrEIA.modules")


def mlp(*hidden: int, activation: type = nn.ReLU):
    def build(c_in: int, c_out: int) -> nn.Sequential:
        layers = []
        for a, b in pairwise([c_in, *hidden, c_out]):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return build


def both(dim: int, blocks: list, cond_dim: int = 0, dtype: torch.dtype = torch.float64):
    """The same sequence of FrEIA's blocks and of ours, with the same numbers (each drawn by its own constructors)."""
    made = []
    for framework, modules in ((Ff, Fm), (ours_f, ours_m)):
        torch.manual_seed(0)
        np.random.seed(0)
        inn = framework.SequenceINN(dim)
        for name, options in blocks:
            condition = {"cond": 0, "cond_shape": (cond_dim,)} if cond_dim and "subnet_constructor" in options else {}
            inn.append(getattr(modules, name), **condition, **options)
        made.append(inn.to(dtype))
    theirs, ours = made
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and a.shape == b.shape, name
        assert torch.equal(a, b), f"{name}: not drawn alike"
    torch.manual_seed(1)
    with torch.no_grad():  # away from the special values of the initialisation
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    if not any(name == "ActNorm" for name, _ in blocks):
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


ALLINONE = ("AllInOneBlock", {"subnet_constructor": mlp(16)})
SEQUENCES = {
    "allinone": (8, [ALLINONE] * 3, 0),
    "allinone soft, odd": (7, [("AllInOneBlock", {"subnet_constructor": mlp(12), "permute_soft": True})] * 3, 0),
    "allinone options": (
        9,
        [
            ("AllInOneBlock", {"subnet_constructor": mlp(12), "global_affine_type": "SIGMOID", "affine_clamping": 1.3}),
            ("AllInOneBlock", {"subnet_constructor": mlp(12), "global_affine_type": "EXP", "global_affine_init": 0.8}),
            ("AllInOneBlock", {"subnet_constructor": mlp(12), "reverse_permutation": True, "global_affine_init": 1.5}),
        ],
        0,
    ),
    "allinone conditional": (6, [ALLINONE] * 2, 3),
    "glow, permutations": (
        6,
        [("GLOWCouplingBlock", {"subnet_constructor": mlp(12, activation=nn.GELU)}), ("PermuteRandom", {"seed": 4})] * 3,
        0,
    ),
    "glow options, conditional": (
        9,
        [("GLOWCouplingBlock", {"subnet_constructor": mlp(8), "clamp_activation": "TANH", "clamp": 1.2, "split_len": 3})] * 2,
        2,
    ),
    "rnvp": (
        7,
        [("RNVPCouplingBlock", {"subnet_constructor": mlp(8, 6), "clamp_activation": "SIGMOID", "split_len": 0.3})] * 2,
        0,
    ),
    "gin and householder, in plain torch": (
        6,
        [
            ("AllInOneBlock", {"subnet_constructor": mlp(8), "gin_block": True}),
            ("AllInOneBlock", {"subnet_constructor": mlp(8), "learned_householder_permutation": 2}),
            ALLINONE,
        ],
        2,
    ),
    "no MLP": (6, [("GLOWCouplingBlock", {"subnet_constructor": mlp(8, activation=nn.Tanh)}), ALLINONE, ALLINONE], 0),
    "clamp of one's own, empty half": (
        5,
        [
            ("RNVPCouplingBlock", {"subnet_constructor": mlp(8), "clamp_activation": torch.sin}),
            ("GLOWCouplingBlock", {"subnet_constructor": mlp(8), "clamp_activation": nn.Identity(), "clamp": 0.4}),
            ("PermuteRandom", {}),
        ],
        0,
    ),
}  # fmt: skip


def run(inn, x, cond, rev):
    x = x.clone().requires_grad_()
    y, logdet = inn(x, c=None if cond is None else [cond], rev=rev)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    ((y * weights).sum() + logdet.square().sum()).backward()
    return y, logdet, x.grad, {name: p.grad for name, p in inn.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_values_logdets_and_gradients_are_freias(name, rev):
    dim, blocks, cond_dim = SEQUENCES[name]
    theirs, ours = both(dim, blocks, cond_dim)
    x = torch.randn(5, dim, dtype=torch.float64)
    cond = torch.randn(5, cond_dim, dtype=torch.float64) if cond_dim else None
    want, got = run(theirs, x, cond, rev), run(ours, x, cond, rev)
    for a, b in zip(want[:3], got[:3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert want[3].keys() == got[3].keys()
    for key, gradient in want[3].items():
        torch.testing.assert_close(got[3][key], gradient, rtol=1e-9, atol=1e-9, msg=key)


def test_blocks_by_themselves_take_and_give_tuples():
    theirs, ours = both(6, [ALLINONE, ("PermuteRandom", {"seed": 1})])
    x = torch.randn(4, 6, dtype=torch.float64)
    for a, b in zip(theirs, ours, strict=True):
        (y,), logdet = b((x,))
        torch.testing.assert_close(y, a((x,))[0][0])
        torch.testing.assert_close(logdet, torch.zeros(4, dtype=torch.float64) + a((x,))[1])
        (again,), back = b((y,), rev=True)
        torch.testing.assert_close(again, x)
        torch.testing.assert_close(back, -logdet)


def count_calls(monkeypatch) -> list:
    calls, true = [], fused.coupling_flow
    monkeypatch.setattr(fused, "coupling_flow", lambda *a, **k: calls.append(a[1].spec) or true(*a, **k))
    return calls


def test_a_sequence_is_one_call(monkeypatch):
    calls = count_calls(monkeypatch)
    blocks = [ALLINONE, ("PermuteRandom", {}), ("GLOWCouplingBlock", {"subnet_constructor": mlp(8)}), ALLINONE]
    _, ours = both(6, blocks, 3)
    ours(torch.randn(2, 6, dtype=torch.float64), c=[torch.randn(2, 3, dtype=torch.float64)])
    assert len(calls) == 1
    _, mixed = both(6, [ALLINONE, ("GLOWCouplingBlock", {"subnet_constructor": mlp(8, activation=nn.Tanh)}), ALLINONE])
    mixed(torch.randn(2, 6, dtype=torch.float64))
    assert len(calls) == 3 and "Tanh" in mixed.why_plain[1] and list(mixed.why_plain) == [1]


def test_a_reason_is_said_once(caplog):
    option = {"subnet_constructor": mlp(8, activation=nn.Hardswish)}
    with caplog.at_level(logging.WARNING):
        both(6, [("GLOWCouplingBlock", option)] * 2)
    found = [record for record in caplog.records if "Hardswish" in record.message]
    assert len(found) == 1 and "plain torch, not on coupling_flow" in found[0].message


def test_actnorm_takes_its_first_batch_and_keeps_a_loaded_one():
    blocks = [ALLINONE, ("ActNorm", {}), ALLINONE, ("ActNorm", {})]
    theirs, ours = both(6, blocks)
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            q.copy_(p)
    x = 3 + 2 * torch.randn(50, 6, dtype=torch.float64)
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert got[0].mean().abs() < 1e-6
    torch.testing.assert_close(ours(x[:5])[0], want[0][:5])
    torch.testing.assert_close(ours(x[:5], rev=True)[0], theirs(x[:5], rev=True)[0])
    again = both(6, blocks)[1]
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again(x[:5])[0], want[0][:5])


def test_parameters_are_seen_wherever_they_go():
    """An optimizer's step, a loaded state, another dtype, a copy, a replaced tensor: the op reads what the module holds."""
    theirs, ours = both(6, [ALLINONE] * 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    for step in range(3):
        for inn in (theirs, ours):
            if step == 0:
                inn.optimizer = torch.optim.Adam([p for p in inn.parameters() if p.requires_grad], lr=0.1)
            y, logdet = inn(x)
            inn.optimizer.zero_grad()
            (y.square().sum() - logdet.sum()).backward()
            inn.optimizer.step()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin[0].global_offset.add_(1.0)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert not torch.allclose(twin(x)[0], ours(x)[0])
    single = copy.deepcopy(ours).float()
    torch.testing.assert_close(single(x.float())[0], theirs(x)[0].float(), rtol=1e-4, atol=1e-4)
    other = both(6, [ALLINONE] * 2)[0]
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x)[0], other(x)[0])
    ours[0].subnet[0].weight = nn.Parameter(torch.zeros_like(ours[0].subnet[0].weight))
    with torch.no_grad():
        other[0].subnet[0].weight.zero_()
    torch.testing.assert_close(ours(x)[0], other(x)[0])


def test_frozen_parameters_get_no_gradient():
    _, ours = both(6, [ALLINONE] * 2)
    ours[0].requires_grad_(False)
    y, _ = ours(torch.randn(3, 6, dtype=torch.float64))
    y.sum().backward()
    assert ours[0].global_scale.grad is None and ours[1].global_scale.grad is not None


def test_freias_tutorial_runs_with_its_imports_changed():
    """Half moons by eight blocks, as in FrEIA's quick start; the likelihood rises as it does there."""
    datasets = pytest.importorskip("sklearn.datasets")

    def train(framework, modules) -> list[float]:
        torch.manual_seed(0)
        np.random.seed(0)

        def subnet_fc(dims_in, dims_out):
            return nn.Sequential(nn.Linear(dims_in, 64), nn.ReLU(), nn.Linear(64, dims_out))

        inn = framework.SequenceINN(2)
        for _ in range(8):
            inn.append(modules.AllInOneBlock, subnet_constructor=subnet_fc, permute_soft=True)
        optimizer, losses = torch.optim.Adam(inn.parameters(), lr=0.001), []
        for _ in range(20):
            optimizer.zero_grad()
            data, _ = datasets.make_moons(n_samples=100, noise=0.05)
            z, log_jac_det = inn(torch.Tensor(data))
            loss = (0.5 * torch.sum(z**2, 1) - log_jac_det).mean() / 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        samples, _ = inn(torch.randn(100, 2), rev=True)
        assert samples.shape == (100, 2)
        return losses

    want, got = train(Ff, Fm), train(ours_f, ours_m)
    assert got == pytest.approx(want, rel=1e-3) and got[-1] < got[0] - 0.1


def test_ours_convert_as_theirs_do():
    theirs, ours = both(6, [ALLINONE] * 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(freia.convert(ours)(x)[0], theirs(x)[0])


def test_what_is_refused():
    sequence = ours_f.SequenceINN(6)
    for call, message in (
        (lambda: ours_f.SequenceINN(3, 8, 8), "vectors"),
        (lambda: sequence.append(Fm.AllInOneBlock, subnet_constructor=mlp(4)), "do not mix"),
        (lambda: sequence.append(nn.Linear), "do not mix"),
        (lambda: sequence.append(ours_m.AllInOneBlock), "subnet_constructor is missing"),
        (lambda: sequence.append(ours_m.AllInOneBlock, subnet_constructor=lambda a, b: 3), "must return a module"),
        (lambda: sequence.append(ours_m.AllInOneBlock, cond=0, subnet_constructor=mlp(4)), "cond_shape"),
        (lambda: ours_m.AllInOneBlock([(3, 4, 4)], subnet_constructor=mlp(4)), "vectors"),
        (lambda: ours_m.AllInOneBlock([(4,)], subnet_constructor=mlp(4), global_affine_type="TANH"), "SOFTPLUS"),
        (lambda: ours_m.GLOWCouplingBlock([(4,)], subnet_constructor=mlp(4), clamp_activation="COS"), "ATAN"),
        (lambda: ours_m.GLOWCouplingBlock([(4,)], subnet_constructor=mlp(4), split_len=5), "split_len"),
        (lambda: ours_m.GLOWCouplingBlock([(4,)], subnet_constructor=mlp(4), split_len=1.5), "split_len"),
        (lambda: ours_m.ActNorm([(2,)])((torch.ones(1, 2),)), "two rows"),
        (lambda: ours_m.ActNorm([(2,)])((torch.ones(4, 2),)), "does not vary"),
        (lambda: ours_m.GLOWCouplingBlock([(4,)], [(2,)], mlp(4))((torch.ones(4, 4),)), "other conditions"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    sequence.append(ours_m.AllInOneBlock, cond=1, cond_shape=(2,), subnet_constructor=mlp(4))
    with pytest.raises(ConfigError, match="needs condition 1"):
        sequence(torch.randn(2, 6), c=[torch.randn(2, 2)])
    with pytest.raises(TypeError):
        ours_m.AllInOneBlock([(4,)], subnet_constructor=mlp(4), no_such_argument=1)
