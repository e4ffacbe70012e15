"""A flow's state through files, copies, half precision and the meta device, and start values it cannot have."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from lmvae_fast.errors import DataError
from lmvae_fast.kernels.coupling_flow import FlowSpec, Stage
from lmvae_fast.models.flow import CouplingFlow

HALVES = (torch.bfloat16, torch.float16)


def flow(dim: int = 6, permutation: str | None = "soft", seed: int = 0, **options) -> CouplingFlow:
    torch.manual_seed(seed)
    return CouplingFlow(dim, 3, 16, permutation=permutation, **options)


def assert_same(one: CouplingFlow, other: CouplingFlow) -> None:
    x = torch.randn(5, one.spec.dim, generator=torch.Generator().manual_seed(1)).to(one.theta.dtype)
    for a, b in zip((*one(x), *one.inverse(x)), (*other(x), *other.inverse(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_a_half_precision_flow_loads_its_own_state(dim, dtype):
    saved, other = flow(dim).to(dtype), flow(dim, seed=1).to(dtype)
    other.load_state_dict(saved.state_dict())
    assert_same(saved, other)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_state_whose_inverse_is_none_is_refused(dtype):
    made = flow(16).to(dtype)
    state = copy.deepcopy(made.state_dict())
    views = flow(16).to(dtype)
    views.load_state_dict(state)
    with torch.no_grad():
        views.named_views()["stages.1.inverse"][3].mul_(1.1)
    with pytest.raises(ValueError, match="stage 1: the stored inverse matrix"):
        made.load_state_dict(views.state_dict())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_flow_is_initialized(dtype):
    made = flow(8, kind="glow").to(dtype)
    z = made.initialize(torch.randn(512, 8, generator=torch.Generator().manual_seed(2)).to(dtype) * 3 + 1)
    assert z.isfinite().all()
    deviation, mean = torch.std_mean(z.float(), dim=0)
    # z is turned once more behind the last scale, which keeps the total variance
    assert deviation.square().mean().sqrt() == pytest.approx(1.0, abs=0.05)
    assert mean.abs().max() < 0.1


def test_a_scale_beyond_a_sigmoid_is_refused_and_changes_nothing():
    made = CouplingFlow.from_spec(FlowSpec(6, 0, (Stage(None, "sigmoid", None),)))
    before = made.theta.clone()
    noise = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"sigmoid.*scale of 1\d\d.*below 10.*rescale"):
        made.initialize(noise * 0.01)
    assert torch.equal(made.theta, before)
    z = made.initialize(noise * 0.2)  # scales of about 5
    torch.testing.assert_close(z.std(0), torch.ones(6), rtol=1e-4, atol=1e-4)


def through_torch_save(made: CouplingFlow) -> CouplingFlow:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[CouplingFlow], CouplingFlow]] = {
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", list(COPIES))
@pytest.mark.parametrize("permutation", ["soft", "hard", None])
def test_a_copy_is_the_same_flow_and_still_checks_what_it_loads(way, permutation):
    made = flow(permutation=permutation)
    made(torch.randn(2, 6))  # with whatever a first call keeps
    other = COPIES[way](made)
    assert_same(made, other)
    with torch.no_grad():
        other.theta.add_(1.0)
    assert not torch.equal(made.theta, other.theta)
    if permutation == "soft":
        state = {**made.state_dict(), "constants": torch.ones_like(made.constants)}
        with pytest.raises(ValueError, match="singular"):
            other.load_state_dict(state)


@pytest.mark.parametrize("permutation", ["soft", "hard", None])
def test_a_flow_built_on_meta(permutation):
    with torch.device("meta"):
        empty = CouplingFlow(6, 3, 16, permutation=permutation)
    assert all(value.is_meta for value in empty.state_dict().values())
    filled = flow(permutation=permutation)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(filled.state_dict(), assign=True)
    assert_same(assigned, filled)
    empty.to_empty(device="cpu")
    empty.reset_parameters()
    empty.check_permutations()
    x = torch.randn(4, 6)
    torch.testing.assert_close(empty.inverse(empty(x)[0])[0], x, rtol=1e-4, atol=1e-5)
    empty.load_state_dict(filled.state_dict())
    assert_same(empty, filled)


@pytest.mark.parametrize("kind", ["allinone", "glow", "coupling"])
def test_a_state_that_was_rounded_loads_into_a_finer_flow(kind):
    torch.manual_seed(0)
    flow = CouplingFlow(16, 3, 16, kind=kind, permutation="soft")
    state = {name: x.bfloat16() if x.is_floating_point() else x for name, x in flow.state_dict().items()}
    finer = CouplingFlow(16, 3, 16, kind=kind, permutation="soft")
    finer.load_state_dict(state)
    x = torch.randn(8, 16)
    z, logdet = finer(x)
    back, undone = finer.inverse(z)  # the inverse is that of the matrix that was loaded, not the rounded one
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(undone, -logdet, rtol=1e-4, atol=1e-4)
    state["constants"] = state["constants"].roll(1)
    with pytest.raises(ValueError, match="stage"):
        finer.load_state_dict(state)


def test_a_flow_that_is_built_in_inference_mode_trains():
    with torch.inference_mode():
        flow = CouplingFlow(6, 2, 8)
    loss = -flow.log_prob(torch.randn(5, 6)).mean()
    loss.backward()
    assert flow.theta.grad is not None and not flow.constants.is_inference()
