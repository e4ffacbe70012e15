"""Bad input of latent_kv's fused AdamW is named."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv, latent_kv_adamw, latent_kv_norm
from tests.kernels.test_latent_kv_adamw import (
    NZ,
    SHAPE,
    make_weight,
)

from .common import raises_naming

# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name():
    weight, z = make_weight().detach(), torch.randn(4, NZ)
    grad = torch.randn(*SHAPE[:2], 4, *SHAPE[2:])
    with raises_naming(ValueError, "grads", "zs", 1, 0):
        latent_kv_norm(weight, [grad], [])
    with raises_naming(ValueError, "grads", [2, 2, 3, 2, 3, 5], [2, 2, 4, 2, 3, 5]):
        latent_kv_norm(weight, [grad], [z[:3]])
    with raises_naming(ValueError, "seeds", 0, 1):
        latent_kv_norm(weight, [grad], [z], dropout=0.5)
    with raises_naming(TypeError, "grads", "int64"):
        latent_kv_norm(weight, [grad.long()], [z])
    scalars = {"step": torch.tensor(1.0), "lr": torch.tensor(0.1), "clip": torch.tensor(1.0)}
    with raises_naming(ValueError, "exp_avg_sq", [2, 2, 2, 3, 5, NZ], [2, 2, 2, 3, 5, 4]):
        latent_kv_adamw(weight, weight.clone(), weight[..., :4], [grad], [z], **scalars)
    with raises_naming(TypeError, "exp_avg_sq", "float64"):
        latent_kv_adamw(weight, weight.clone(), weight.double(), [grad], [z], **scalars)
    with raises_naming(ValueError, "clip", [2]):
        latent_kv_adamw(weight, weight.clone(), weight.clone(), [grad], [z], **{**scalars, "clip": torch.ones(2)})
    turned = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    with raises_naming(ValueError, "weight", "stride 1"):
        latent_kv_adamw(turned, weight.clone(), weight.clone(), [grad], [z], **scalars)


def test_a_wrong_optimizer_is_refused_by_name():
    weight = make_weight()
    with raises_naming(ValueError, "shape", [120, NZ]):
        LatentKVAdamW(torch.nn.Parameter(weight.detach().view(-1, NZ)))
    with raises_naming(ValueError, "shape", (2, 2, 2, 3, 4)):
        LatentKVAdamW(weight, (2, 2, 2, 3, 4))
    with raises_naming(ValueError, "weight", "contiguous"):
        LatentKVAdamW(torch.nn.Parameter(weight.detach().transpose(0, 1)))
    with raises_naming(ValueError, "lr=-1"):
        LatentKVAdamW(weight, lr=-1.0)
    with raises_naming(ValueError, "betas"):
        LatentKVAdamW(weight, betas=(0.9, 1.0))
    optimizer = LatentKVAdamW(weight)
    optimizer.project(torch.randn(2, NZ), dropout=0.1).sum().backward()
    with raises_naming(ValueError, "dropout=0.0", 0.1):
        optimizer.project(torch.randn(2, NZ))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("slots", [(3, 3), (2, 5), (None, 4)])
def test_forwards_over_the_first_slots_equal_those_whose_other_slots_nothing_reads(slots, dropout):
    """Also slots that have moments from an earlier step, and none of a gradient in this one."""
    layers, heads, most, dim, nz = 2, 2, 5, 3, 4
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(layers, 2, heads, most, dim, nz, generator=make, dtype=torch.float64)
    bias = torch.randn(layers, 2, heads, most, dim, generator=make, dtype=torch.float64)
    plain = torch.nn.Parameter(weight.clone())
    other = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    fused = LatentKVAdamW(torch.nn.Parameter(weight.clone()), lr=0.1, weight_decay=0.1)
    for counts in ((None, None), slots):
        for i, count in enumerate(counts):
            z = torch.randn(3, nz, generator=make, dtype=torch.float64)
            memory = fused.project(z, bias[:, :, :, :count], dropout=dropout, seed=i, slots=count)
            grad = torch.randn(memory.shape, generator=make, dtype=torch.float64)
            memory.backward(grad)
            want = latent_kv(z, plain[:, :, :, :count], bias[:, :, :, :count], dropout=dropout, seed=i)
            torch.testing.assert_close(memory, want)
            want.backward(grad)
        torch.testing.assert_close(fused.norm_sq(), plain.grad.square().sum())
        fused.step(clip=0.5)
        plain.grad.mul_(0.5)
        other.step()
        other.zero_grad()
    torch.testing.assert_close(fused.weight, plain)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(fused.state[fused.weight][name], other.state[plain][name])
