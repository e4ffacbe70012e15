"""latent_kv's Triton kernels where sizes and strides are multiples of 16: other code runs there, to the same figures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lmvae_fast.kernels.latent_kv import LatentKVAdamW, latent_kv
from lmvae_fast.kernels.latent_kv import triton as launchers
from lmvae_fast.kernels.launch import launch

from .common import on_backend, require

ALIGNED = (1, 2, 1, 16, 16, 32)  # layers, sides, heads, slots, head_dim, latent
SHAPE = {"aligned": (ALIGNED, 16), "odd batch": (ALIGNED, 15), "odd latent": ((1, 2, 1, 16, 16, 31), 16)}


@pytest.fixture
def launched(monkeypatch):
    """(kernel, constants of its configuration and flags) of every launch."""
    seen = []

    def noted(kernel, grid, device, config, *args, **constants):
        seen.append((kernel.fn.__name__, {**config.constants, **constants}))
        return launch(kernel, grid, device, config, *args, **constants)

    monkeypatch.setattr(launchers, "launch", noted)
    return seen


@pytest.mark.parametrize("case", SHAPE)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients(launched, case, dropout):
    require("latent_kv", "triton", torch.float32)
    shape, batch = SHAPE[case]
    torch.manual_seed(0)
    z, weight = torch.randn(batch, shape[-1]), torch.randn(shape) / 6
    upstream = torch.randn(*shape[:2], batch, *shape[2:-1])

    def run(name):
        leaves = [x.clone().requires_grad_() for x in (z, weight)]
        memory = on_backend(latent_kv, name)(*leaves, dropout=dropout, seed=7)
        return memory, *torch.autograd.grad(memory, leaves, upstream)

    for mine, theirs in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    (rows,) = {constants["BLOCK_R"] for name, constants in launched if name == "latent_kv_dz_kernel"}
    assert rows == (32 if case == "aligned" and dropout == 0.0 else 16)


@pytest.mark.parametrize("case", SHAPE)
def test_update(launched, case):
    """The state asked for before the product is the state that the product's gradient then moves."""
    require("latent_kv", "triton", torch.float32)
    shape, batch = SHAPE[case]
    torch.manual_seed(0)
    weight, zs = torch.randn(shape) / 6, torch.randn(2, batch, shape[-1])
    upstream = torch.randn(2, *shape[:2], batch, *shape[2:-1])

    def run(name):
        own = torch.nn.Parameter(weight.clone())
        optimizer = LatentKVAdamW(own, shape[:-1], lr=1e-2, weight_decay=0.1)
        norms = []
        for z, grad in zip(zs, upstream, strict=True):
            leaf = z.clone().requires_grad_()
            on_backend(optimizer.project, name)(leaf).backward(grad)
            norms.append(on_backend(optimizer.norm_sq, name)())
            on_backend(optimizer.step, name)()
            optimizer.zero_grad()
        return own.detach(), torch.stack(norms)

    for mine, theirs in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    early = {constants["EARLY"] for name, constants in launched if name == "latent_kv_adamw_kernel"}
    grams = {constants["BLOCK_R"] for name, constants in launched if name == "latent_kv_gram_kernel"}
    assert early == {case == "aligned"} and grams == {32 if case == "aligned" else 16}
