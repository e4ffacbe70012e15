"""Public function of latent_kv: checks, then the backend that runs this call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        z: latents, ``[B, nz]``, of weight's dtype (under autocast any: it is cast to weight's).
        weight: ``[L, 2, Hkv, M, D, nz]`` fp64/fp32/fp16/bf16, index 1 = (key, value). Any strides with the last dim
            contiguous; slots are chosen by slicing it: ``weight[:, :, :, i:i + 1]``.
        bias: ``[L, 2, Hkv, M, D]`` of weight's dtype, or None.
        dropout: probability of zeroing an element of the memory; the kept ones are scaled by 1 / (1 - dropout).
        seed: of the dropout mask: None (drawn from torch's generator of the device), an int, or an int64 tensor [2] =
            (seed, offset) on the device. The mask depends on it and on the linear index of the element only.
        out: written in place and returned: ``[L, 2, B, Hkv, M, D]`` of any floating dtype and any strides with the last
            dim contiguous, e.g. ``cache[:, :, :, :, 0:2 * M:2]``. No autograd through this form.
        dtype: of the memory; default: out's, else autocast's, else weight's (a master weight in fp32 may give bf16 memory).

    Returns:
        memory ``[L, 2, B, Hkv, M, D]``, contiguous unless ``out`` is given.

    Raises:
        ValueError: sizes that do not match, dropout outside [0, 1), out with gradients.
        TypeError: dtypes or devices that are mixed.
    """
    dtype = _check(z, weight, bias, dropout, out, dtype)
    z = z.to(weight.dtype)
    seed_tensor = _seed_tensor(seed, z.device) if dropout > 0.0 else None
    memory = reference.latent_kv(z, weight, bias, dropout, seed_tensor, dtype)
    if out is not None:
        return out.copy_(memory)
    return memory


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.shape != (2,) or seed.dtype != torch.int64:
            raise ValueError(f"seed: want an int64 tensor [2] = (seed, offset), got {seed.dtype} {list(seed.shape)}")
        return seed
    if seed is None:
        first = torch.randint(0, 2**62, (1,), device=device)
        return torch.cat([first, torch.zeros_like(first)])
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def _check(
    z: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, out: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Raise on bad input; return the memory's dtype."""
    if z.dim() != 2:
        raise ValueError(f"z: want [B, nz], got {list(z.shape)}")
    if weight.dim() != 6 or weight.shape[1] != 2:
        raise ValueError(f"weight: want [L, 2, Hkv, M, D, nz], got {list(weight.shape)}")
    if weight.shape[-1] != z.shape[1]:
        raise ValueError(f"weight: its last dim is {weight.shape[-1]}, but z has nz = {z.shape[1]}")
    autocast = torch.is_autocast_enabled(z.device.type)
    if weight.dtype not in _FLOATS or not z.is_floating_point():
        raise TypeError(f"z, weight: want floating dtypes, got {z.dtype}, {weight.dtype}")
    if z.dtype != weight.dtype and not autocast:
        raise TypeError(f"z: its dtype is {z.dtype}, but weight's is {weight.dtype}")
    if z.device != weight.device:
        raise TypeError(f"z: it is on {z.device}, but weight is on {weight.device}")
    if bias is not None:
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"bias: want {list(weight.shape[:-1])} (weight's dims but the last), got {list(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias: its dtype is {bias.dtype}, but weight's is {weight.dtype}")
        if bias.device != weight.device:
            raise TypeError(f"bias: it is on {bias.device}, but weight is on {weight.device}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: want a probability in [0, 1), got {dropout}")
    if out is not None:
        layers, two, heads, slots, dim, _ = weight.shape
        want = [layers, two, z.shape[0], heads, slots, dim]
        if list(out.shape) != want:
            raise ValueError(f"out: want {want} ([L, 2, B, Hkv, M, D]), got {list(out.shape)}")
        if dim > 1 and out.numel() and out.stride(-1) != 1:
            raise ValueError(f"out: its last dim must be contiguous (stride 1), got stride {out.stride(-1)}")
        if out.device != z.device:
            raise TypeError(f"out: it is on {out.device}, but z is on {z.device}")
        if not out.is_floating_point() or (dtype is not None and dtype != out.dtype):
            raise TypeError(f"out: its dtype is {out.dtype}, but the memory's is {dtype or 'floating'}")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, weight, bias)):
            raise ValueError("out: this form has no gradient, but z, weight or bias requires one; use torch.no_grad()")
        return out.dtype
    if dtype is not None:
        if dtype not in _FLOATS:
            raise TypeError(f"dtype: want a floating dtype, got {dtype}")
        return dtype
    return torch.get_autocast_dtype(z.device.type) if autocast else weight.dtype
