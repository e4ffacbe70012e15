"""latent_kv: registration, autograd and the public function. The truth is reference.py, the optimizer form adamw.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend, philox
from ..inplace import written
from ..registration import define, primitives, reference_gradients, refuse_vmap, tangents
from . import reference
from .checks import check_latent_kv

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake_fwd(z, weight, bias, dropout, seed, dtype):
    layers, two, heads, slots, dim, _ = weight.shape
    return weight.new_empty((layers, two, z.shape[0], heads, slots, dim), dtype=dtype)


def _fake_out(z, weight, bias, dropout, seed, out):
    return None


def _fake_bwd(grad, z, weight, dropout, seed, need_z, need_weight, need_bias):
    dz = z.new_empty(tuple(z.shape) if need_z else (0,))
    dweight = weight.new_empty(tuple(weight.shape) if need_weight else (0,))
    return dz, dweight, weight.new_empty(tuple(weight.shape[:-1]) if need_bias else (0,))


def _triton_fwd(z, weight, bias, dropout, seed, dtype):
    from .triton import latent_kv_into

    memory = _fake_fwd(z, weight, bias, dropout, seed, dtype)
    latent_kv_into(z, weight, bias, dropout, seed, memory)
    return memory


def _triton_out(*args):
    from .triton import latent_kv_into

    latent_kv_into(*args)


def _triton_bwd(*args):
    from .triton import latent_kv_bwd

    return latent_kv_bwd(*args)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, weight, _, ctx.dropout, seed, _ = inputs
    ctx.save_for_backward(z, weight, seed)


def _backward(ctx: Any, grad: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 6
    z, weight, seed = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        bias = weight.new_zeros(weight.shape[:-1])  # any: the memory is linear in it

        def function(z, weight, bias):
            return reference.latent_kv(z, weight, bias, ctx.dropout, seed, grad.dtype)

        return *reference_gradients(function, (z, weight, bias), need, (grad,)), None, None, None
    grads = ctx.primitives.latent_kv_bwd(grad, z, weight, ctx.dropout, seed, *need)
    return *(g if wanted else None for g, wanted in zip(grads, need, strict=True)), None, None, None


define(
    "latent_kv_bwd(Tensor grad, Tensor z, Tensor weight, float dropout, Tensor? seed, bool need_z, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    triton=_triton_bwd,
)
define(
    "latent_kv_fwd(Tensor z, Tensor weight, Tensor? bias, float dropout, Tensor? seed, ScalarType dtype) -> Tensor",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "latent_kv_out(Tensor z, Tensor weight, Tensor? bias, float dropout, Tensor? seed, Tensor(a!) out) -> ()",
    fake=_fake_out,
    triton=_triton_out,
)
PRIMITIVES = ("latent_kv_fwd", "latent_kv_out", "latent_kv_bwd", "latent_kv_norm", "latent_kv_adamw")


def _triton_check(facts: Any) -> str | None:
    return "triton writes fp32, fp16 and bf16 memory" if facts.get("memory") == torch.float64 else None


backend.register(
    "latent_kv",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, PRIMITIVES),
    triton=backend.Support(backend.FLOATS, PRIMITIVES, _triton_check),
)

# ---- the public function ---------------------------------------------------------------------------------------------


def latent_kv(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Project z to the keys and values of all layers: memory[l, s, b] = dropout(weight[l, s] @ z[b] + bias[l, s]).

    Args:
        z: latents, ``[B, nz]``, of weight's dtype (under autocast of any floating dtype: it is cast to weight's).
        weight: ``[L, 2, Hkv, M, D, nz]`` fp64, fp32, fp16 or bf16; index 1 is (key, value). Any strides; nothing is
            copied while the last dim is contiguous, so slots are chosen by slicing: ``weight[:, :, :, i:i + 1]``.
        bias: ``[L, 2, Hkv, M, D]`` of weight's dtype, or None.
        dropout: probability of zeroing an element of the memory; the kept ones are scaled by 1 / (1 - dropout).
        seed: of the dropout mask, as `philox.seed_tensor` takes it: None (drawn from torch's generator of the device),
            an int, or an int64 tensor [2] = (seed, offset) on the device. The mask depends on it and on the element's
            index only (`reference.keep_mask`); backward draws it again, on a CPU it finds it as bits. Where processes share a
            batch: an int64 tensor [5] = (seed, offset, first, step, total) on the device; these sentences are then
            numbers first, first + step, ... of a batch of ``total``, and have the masks they would have there.
        out: written in place and returned: ``[L, 2, B, Hkv, M, D]`` of any floating dtype and any strides with the
            last dim contiguous, e.g. every second position, ``cache[:, :, :, :, 0:2 * M:2]``. It has no autograd.
        dtype: of the memory. Default: out's, else autocast's, else weight's. An fp32 master weight may give bf16
            memory: products are then summed in fp32 and rounded once.

    Returns:
        memory ``[L, 2, B, Hkv, M, D]``, contiguous unless ``out`` is given. Differentiable in z, weight and bias; their
        gradients have their dtypes. dW [.., nz] is as large as the weight: `LatentKVAdamW` trains without making it.

    Raises:
        ValueError: sizes that do not match, dropout outside [0, 1), `out` where a gradient is wanted, or with elements
            that share memory.
        TypeError: dtypes that are mixed or not floating, torch.func.vmap.
        BackendError: a forced backend cannot run.

    Source: the projector of LangVAE (arXiv 2505.00004, section 3; one linear map with dropout per layer), of which the
    memory of Optimus (arXiv 2004.04092, section 3.2) and LlaMaVAE (arXiv 2312.13208) are cases.
    """
    dtype = check_latent_kv(z, weight, bias, out, dtype)
    refuse_vmap("latent_kv", z, weight, bias, out)
    philox.dropout_threshold(dropout)  # raises outside [0, 1)
    z = z.to(weight.dtype)
    stream = stream_tensor(seed, z.device) if dropout > 0.0 else None
    choice = backend.choose("latent_kv", weight, memory=dtype, **tangents(z, weight, bias, out))
    if choice == "reference":
        memory = reference.latent_kv(z, weight, bias, dropout, stream, dtype)
        return memory if out is None else out.copy_(memory)
    if out is None:
        return primitives(choice, z).latent_kv_fwd(z, weight, bias, dropout, stream, dtype)
    with torch.no_grad():
        primitives(choice, z).latent_kv_out(z, weight, bias, dropout, stream, out)
    written(out)
    return out


def stream_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The dropout's stream on `device`: what `philox.seed_tensor` makes of a seed, or the five numbers of a shared batch."""
    if not isinstance(seed, Tensor) or seed.shape != (5,):
        return philox.seed_tensor(seed, device)
    philox.seed_tensor(seed[:2], device)  # raises for another dtype or device
    return seed.detach().contiguous()
