"""CouplingFlow as users see it: invertible, a density, data-dependent initialisation, checkpoints, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.models.flow import CouplingFlow

SMALL = {"blocks": 3, "hidden": 24}


@pytest.mark.parametrize("kind", ["allinone", "glow"])
@pytest.mark.parametrize("permutation", ["hard", "soft", None])
@pytest.mark.parametrize("dim", [2, 5, 16, 129])
def test_inverse_undoes_forward(kind, permutation, dim):
    flow = CouplingFlow(dim, kind=kind, permutation=permutation, **SMALL)
    x = torch.randn(7, dim)
    z, logdet = flow(x)
    back, logdet_back = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-4, atol=1e-5)


def test_condition_reaches_every_block():
    flow = CouplingFlow(6, cond_dim=3, **SMALL)
    x, c = torch.randn(4, 6), torch.randn(4, 3, requires_grad=True)
    z, logdet = flow(x, c)
    (dc,) = torch.autograd.grad(z.sum() + logdet.sum(), c)
    assert (dc != 0).all()
    torch.testing.assert_close(flow.inverse(z, c)[0], x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cond"):
        flow(x)


def test_log_prob_is_the_change_of_variables():
    flow = CouplingFlow(5, **SMALL).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0])
    z = flow(x)[0][0]
    expected = torch.linalg.slogdet(jacobian).logabsdet - 0.5 * z.square().sum() - 2.5 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(x)[0], expected)


def test_log_prob_with_a_posterior_as_base():
    flow = CouplingFlow(4, **SMALL).double()
    x, mu, logvar = (torch.randn(6, 4, dtype=torch.float64) for _ in range(3))
    z, logdet = flow(x)
    base = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    torch.testing.assert_close(flow.log_prob(x, mu=mu, logvar=logvar), base.log_prob(z).sum(1) + logdet)


def test_density_integrates_to_one():
    flow = CouplingFlow(2, blocks=2, hidden=16, kind="glow").double()
    grid = torch.linspace(-12, 12, 601, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        total = flow.log_prob(points).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(total.item() - 1) < 1e-3


def test_samples_follow_the_seed_and_the_density():
    flow = CouplingFlow(3, **SMALL)
    with torch.no_grad():
        a = flow.sample(5, generator=torch.Generator().manual_seed(1))
        b = flow.sample(5, generator=torch.Generator().manual_seed(1))
        z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(a, b)
        torch.testing.assert_close(flow(a)[0], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["allinone", "glow"])
def test_initialize_gives_mean_zero_and_deviation_one_at_every_stage(kind):
    flow = CouplingFlow(7, kind=kind, permutation="hard", **SMALL).double()
    x = 5 + 3 * torch.randn(200, 7, dtype=torch.float64)
    z = flow.initialize(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow(x)[0], z)
    with pytest.raises(DataError, match="two rows"):
        flow.initialize(x[:1])
    with pytest.raises(DataError, match="channel"):
        flow.initialize(x[:1].expand(4, 7))


def test_training_raises_the_likelihood():
    torch.manual_seed(0)
    flow = CouplingFlow(4, blocks=4, hidden=32)
    data = torch.randn(256, 4) @ torch.randn(4, 4) + 2
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2


def test_both_memory_modes_train_alike():
    torch.manual_seed(0)
    saved = CouplingFlow(9, memory="save", **SMALL)
    recomputed = CouplingFlow(9, memory="recompute", **SMALL)
    recomputed.load_state_dict(saved.state_dict())
    x = torch.randn(11, 9)
    for flow in (saved, recomputed):
        (-flow.log_prob(x).mean()).backward()
    torch.testing.assert_close(saved.theta.grad, recomputed.theta.grad, rtol=1e-4, atol=1e-6)


def test_state_dict_round_trip_and_corrupt_permutation():
    flow, other = CouplingFlow(8, **SMALL), CouplingFlow(8, **SMALL)
    x = torch.randn(3, 8)
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other(x), flow(x), rtol=0, atol=0)
    state = flow.state_dict()
    state["indices"] = state["indices"].clone()
    state["indices"][0] = state["indices"][1]
    with pytest.raises(ValueError, match="exactly once"):
        other.load_state_dict(state)


def test_given_permutations():
    index = torch.tensor([2, 0, 1])
    flow = CouplingFlow(3, blocks=1, hidden=4, permutation=[index])
    matrix = torch.eye(3)[index]
    same = CouplingFlow(3, blocks=1, hidden=4, permutation=[matrix])
    with torch.no_grad():
        same.theta.copy_(flow.theta)
    x = torch.randn(5, 3)
    torch.testing.assert_close(same(x), flow(x))


def test_a_scaling_matrix_counts_in_the_logdet():
    flow = CouplingFlow(3, blocks=1, hidden=4, permutation=[torch.diag(torch.tensor([1.0, 2.0, 3.0]))])
    plain = CouplingFlow(3, blocks=1, hidden=4, permutation=None)
    with torch.no_grad():
        plain.theta.copy_(flow.theta)
    x = torch.randn(5, 3)
    torch.testing.assert_close(flow(x)[1], plain(x)[1] + math.log(6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 1}, ValueError, "dim"),
        ({"dim": 2000}, ValueError, "1024"),
        ({"clamp": 0.0}, ValueError, "clamp"),
        ({"clamp": -2.0}, ValueError, "clamp"),
        ({"kind": "nice"}, ConfigError, "nice"),
        ({"blocks": 0}, ConfigError, "block"),
        ({"hidden": 0}, ValueError, "hidden"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"permutation": "learned"}, ValueError, "learned"),
        ({"blocks": 1, "permutation": [torch.tensor([0, 0, 1, 2])]}, ValueError, "exactly once"),
        ({"blocks": 1, "permutation": [torch.tensor([0, 1, 2])]}, ValueError, r"\[4\].*\[3\]"),
        ({"blocks": 1, "permutation": [torch.tensor([0.0, 1.0, 2.0, 3.0])]}, TypeError, "integral"),
        ({"blocks": 1, "permutation": [torch.zeros(4, 4)]}, ValueError, "singular"),
        ({"blocks": 1, "permutation": [torch.ones(4, 4)]}, ValueError, "singular"),
        ({"blocks": 1, "permutation": [torch.full((4, 4), float("nan"))]}, ValueError, "NaN"),
        ({"blocks": 1, "permutation": [torch.eye(3)]}, ValueError, r"\[4, 4\].*\[3, 3\]"),
        ({"blocks": 2, "permutation": [torch.eye(4)]}, ConfigError, "one permutation per block"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CouplingFlow(**{"dim": 4, **SMALL, **arguments})
