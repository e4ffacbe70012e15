"""latent_attention by flash attention: under `prefix` visibility a sentence is [slots | tokens] under a causal mask that is
aligned to the bottom right, which is what flash-attn's function for sentences of several lengths computes.

It is the better kernel for long sentences of half types on CUDA; ours is made for tens of tokens. The keys and values are
copied into one packed tensor for it, 2 (T + B M) Hkv D numbers.

Sources: Dao 2023 (arXiv 2307.08691); flash_attn.flash_attn_varlen_func (flash-attn 2.1 and later, whose causal mask is aligned
so), torch.nn.attention.varlen.varlen_attn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .visibility import PREFIX, visibility_code

#: Tokens of the longest sentence from which flash attention is taken: not measured on a device yet.
LEAST_TOKENS = 512
#: What it runs on.
DEVICES, HALVES = ("cuda",), (torch.float16, torch.bfloat16)

Varlen = Callable[..., Tensor]


@cache
def flash_attn_function() -> Varlen | None:
    """flash-attn's function for packed sentences, or None where that is not installed; its gradients are asked for in a fixed
    order."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float,
            window: tuple[int, int], softcap: float | None) -> Tensor:  # fmt: skip
        capped = {} if softcap is None else {"softcap": softcap}
        return flash_attn_varlen_func(
            q,
            k,
            v,
            *offsets,
            *longest,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            deterministic=True,
            **capped,
        )

    return run


@cache
def torch_function() -> Varlen | None:
    """torch's own, or None where this torch has none with windows and grouped heads. Without a cap of the scores; the order of
    its gradients' sums is torch's to choose."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float,
            window: tuple[int, int], softcap: float | None) -> Tensor:  # fmt: skip
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, *offsets, *longest, scale=scale, window_size=(window[0], 0), enable_gqa=grouped)
        return out if isinstance(out, Tensor) else out[0]

    return run


def reason_against(
    q: Tensor,
    values: int,
    *,
    visibility: str,
    max_seqlen: int | None,
    softcap: float | None,
    sinks: bool,
    graded: bool,
    forced: bool,
) -> str | None:
    """Why a call of latent_attention is not for flash attention, or None. values: width of v; graded: a gradient will be asked
    for; forced: somebody wants it whatever the length."""
    own, torchs = flash_attn_function(), torch_function()
    if own is None and torchs is None:
        return "flash-attn is not installed, and this torch has no attention over sentences of several lengths"
    known = (
        (visibility_code(visibility) != PREFIX, f"flash attention knows no {visibility} visibility, only prefix"),
        (sinks, "flash attention has no sinks"),
        (max_seqlen is None, "flash attention needs max_seqlen"),
        (q.shape[-1] != values, f"flash attention takes keys and values of one width, not {q.shape[-1]} and {values}"),
        (q.shape[-1] % 8 != 0, f"flash attention takes widths of heads that 8 divides, not {q.shape[-1]}"),
        (own is None and softcap is not None, "torch's flash attention has no cap of the scores; flash-attn has"),
        (
            own is None and graded,
            "the order of sums in torch's flash attention's gradients is not fixed; flash-attn's is",
        ),
        (
            not forced and (max_seqlen or 0) < LEAST_TOKENS,
            f"the longest sentence has {max_seqlen} tokens, flash attention is taken from {LEAST_TOKENS} on",
        ),
    )
    return next((reason for holds, reason in known if holds), None)


def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor | None, memory_v: Tensor | None, *, cu_seqlens: Tensor, scale: float,
    max_seqlen: int, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Same contract as ``op.latent_attention`` under ``prefix`` visibility; differentiable through torch's copies and the
    function's own backward."""
    slots = 0 if memory_k is None else memory_k.shape[2]
    offsets = cu_seqlens
    if memory_k is not None and memory_v is not None and slots:
        k, v = (_joined(memory, x, cu_seqlens) for memory, x in ((memory_k, k), (memory_v, v)))
        offsets = cu_seqlens + slots * torch.arange(cu_seqlens.numel(), dtype=torch.int32, device=q.device)
    run = flash_attn_function() or torch_function()
    assert run is not None  # `reason_against` has looked
    reach = (-1 if window is None else window - 1, 0)  # positions before its own that a token sees, and after
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return run(q, k, v, (cu_seqlens, offsets), (max_seqlen, slots + max_seqlen), scale, reach, softcap)


def _joined(memory: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sentence's slots ``[B, Hkv, M, D]`` before its tokens ``[T, Hkv, D]``, packed: ``[T + B M, Hkv, D]``."""
    batch, _, slots, _ = memory.shape
    tokens = torch.arange(x.shape[0], device=x.device)
    owner = torch.searchsorted(cu_seqlens, tokens.to(torch.int32), right=True) - 1
    of_tokens = tokens + (owner + 1) * slots
    starts = cu_seqlens[:-1].long() + torch.arange(batch, device=x.device) * slots
    of_slots = (starts.unsqueeze(1) + torch.arange(slots, device=x.device)).flatten()
    packed = x.new_empty(x.shape[0] + batch * slots, *x.shape[1:])
    packed = packed.index_copy(0, of_slots, memory.transpose(1, 2).flatten(0, 1).to(x.dtype))
    return packed.index_copy(0, of_tokens, x)


def facts(forced: str, q: Tensor, values: int, **of_call: Any) -> dict[str, str | None]:
    """What the registry is told about a call; nothing where flash attention could not run anyhow."""
    if q.device.type not in DEVICES or q.dtype not in HALVES or torch.compiler.is_compiling():
        return {}
    return {"flash": reason_against(q, values, forced=forced == "flash", **of_call)}


def check(found: Mapping[str, Any]) -> str | None:
    """For the registry: the reason that `facts` found."""
    by_call = f"chosen call by call: prefix visibility, half types, sentences of {LEAST_TOKENS} tokens or more"
    return found.get("flash", by_call)
