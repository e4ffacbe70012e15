"""Bad input of latent_kv is named with both sizes."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.kernels.backend import BackendError, backend
from lmvae_fast.kernels.latent_kv import latent_kv
from tests.kernels.test_latent_kv import (
    inputs,
)

from .common import (
    raises_naming,
)

# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name():
    z, weight, bias = inputs((2, 3, 2, 4, 5, 7))
    with raises_naming(ValueError, "z", [3, 7, 1]):
        latent_kv(z[..., None], weight)
    with raises_naming(ValueError, "weight", [2, 2, 2, 4, 35]):
        latent_kv(z, weight.flatten(4))
    with raises_naming(ValueError, "weight", [2, 1, 2, 4, 5, 7]):
        latent_kv(z, weight[:, :1])
    with raises_naming(ValueError, "weight", "z", 7, 6):
        latent_kv(z[:, :6], weight)
    with raises_naming(ValueError, "bias", [2, 2, 2, 4, 5], [2, 2, 2, 4, 4]):
        latent_kv(z, weight, bias[..., :4])
    with raises_naming(TypeError, "z", "float64", "float32"):
        latent_kv(z.double(), weight)
    with raises_naming(TypeError, "bias", "float16", "float32"):
        latent_kv(z, weight, bias.half())
    with raises_naming(TypeError, "int64"):
        latent_kv(z.long(), weight)
    with raises_naming(TypeError, "dtype", "int32"):
        latent_kv(z, weight, dtype=torch.int32)
    with raises_naming(ValueError, "meta", "cpu"):
        latent_kv(z, weight.to("meta"))
    for p in (-0.1, 1.0, float("nan")):
        with raises_naming(ValueError, "dropout", p):
            latent_kv(z, weight, dropout=p)
    with raises_naming(ValueError, "seed"):
        latent_kv(z, weight, dropout=0.1, seed=torch.tensor([1]))
    with raises_naming(ValueError, "seed"):
        latent_kv(z, weight, dropout=0.1, seed=torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0]))


def test_bad_out_is_refused_by_name():
    z, weight, _ = inputs((2, 3, 2, 4, 5, 7))
    cache = torch.zeros(2, 2, 3, 2, 9, 5)
    with raises_naming(ValueError, "out", [2, 2, 3, 2, 4, 5], [2, 2, 3, 2, 3, 5]):  # a cache too small for the slots
        latent_kv(z, weight, out=cache[:, :, :, :, :3])
    with raises_naming(ValueError, "out", "stride 9"):
        latent_kv(z, weight, out=torch.zeros(2, 2, 3, 2, 5, 9).transpose(-1, -2)[:, :, :, :, :4])
    with raises_naming(TypeError, "out", "int64"):
        latent_kv(z, weight, out=cache[:, :, :, :, :4].long())
    with raises_naming(TypeError, "out", "bfloat16", "float32"):
        latent_kv(z, weight, out=cache[:, :, :, :, :4], dtype=torch.bfloat16)
    with raises_naming(ValueError, "out", "gradient"):
        latent_kv(z.requires_grad_(), weight, out=cache[:, :, :, :, :4])


def test_vmap_is_refused():
    z, weight, _ = inputs((2, 3, 2, 4, 5, 7))
    with raises_naming(TypeError, "latent_kv", "vmap"):
        torch.func.vmap(lambda x: latent_kv(x, weight))(torch.stack([z, z]))


def test_a_forced_backend_that_cannot_run_says_why():
    z, weight, _ = inputs((2, 3, 2, 4, 5, 7), torch.float64)
    with backend("triton"), pytest.raises(BackendError, match=r"latent_kv.*float64"):
        latent_kv(z, weight)
