"""latent_attention: registration, autograd, public functions. The truth is reference.py, the rules visibility.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..inplace import check_written, written
from ..registration import autocast, define, primitives, refuse_gradients, refuse_vmap, tangents
from . import flash, reference
from .checks import (
    check_decode,
    check_lengths,
    check_new_token,
    check_offsets,
    check_packed,
    check_positions,
    check_sinks,
    check_tensors,
)
from .sinks import latent_attention_with_sinks
from .visibility import visibility_code

# ---- primitives ------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? memory_k, Tensor? memory_v"
_OPTIONS = "Tensor cu_seqlens, int visibility, float scale, SymInt? max_seqlen, int? window, float? softcap"


def _fake_fwd(q, k, v, memory_k, memory_v, cu_seqlens, visibility, scale, max_seqlen, window, softcap):
    stats = q.new_empty((q.shape[0], q.shape[1], 2), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(tuple(q.shape)), stats


def _fake_bwd(grad_out, q, k, v, memory_k, memory_v, out, stats, cu_seqlens, *options):
    memory = (0,) if memory_k is None else tuple(memory_k.shape)
    shapes = (tuple(q.shape), (2, *k.shape), (2, *memory))  # gradients of keys and of values together
    return tuple(q.new_empty(shape) for shape in shapes)


def _fake_decode(q, k_cache, v_cache, lengths, scale, window, softcap):
    return q.new_empty(tuple(q.shape))


def _fake_step(q, k, v, k_cache, v_cache, positions, lengths, scale, window, softcap):
    return q.new_empty(tuple(q.shape))


def _triton_fwd(*args):
    from .triton import latent_attention_fwd

    return latent_attention_fwd(*args)


def _triton_bwd(*args):
    from .triton import latent_attention_bwd

    return latent_attention_bwd(*args)


def _triton_decode(*args):
    from .triton import latent_attention_decode

    return latent_attention_decode(*args)


def _triton_step(*args):
    from .triton import latent_attention_step

    return latent_attention_step(*args)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, cu_seqlens, visibility, scale, max_seqlen, window, softcap = inputs
    ctx.options = (visibility, scale, max_seqlen, window, softcap)
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _backward(ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None) -> tuple:
    rest = (None,) * 6
    if grad_out is None:
        return (None,) * 5 + rest
    saved = ctx.saved_tensors
    grad_q, grad_kv, grad_memory = ctx.primitives.latent_attention_bwd(grad_out, *saved, *ctx.options)
    memory = (None, None) if saved[3] is None else grad_memory.unbind()
    return (grad_q, *grad_kv.unbind(), *memory, *rest)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple:
    raise RuntimeError("latent_attention has no second derivative; backend('reference') has one")


define(
    f"latent_attention_bwd(Tensor grad_out, {_INPUTS}, Tensor out, Tensor stats, {_OPTIONS}) -> "
    "(Tensor grad_q, Tensor grad_kv, Tensor grad_memory)",
    fake=_fake_bwd,
    triton=_triton_bwd,
    backward=_no_second_derivative,
)
define(
    f"latent_attention_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "latent_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, int? window, "
    "float? softcap) -> Tensor",
    fake=_fake_decode,
    triton=_triton_decode,
)
define(
    "latent_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor lengths, float scale, int? window, float? softcap) -> Tensor",
    fake=_fake_step,
    triton=_triton_step,
)
_PRIMITIVES = ("latent_attention_fwd", "latent_attention_bwd")
backend.register(
    "latent_attention",
    flash=backend.Support(flash.HALVES, check=flash.check),
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, _PRIMITIVES),
    triton=backend.Support(backend.FLOATS, _PRIMITIVES),
)
backend.register(
    "latent_attention_decode",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, ("latent_attention_decode", "latent_attention_step")),
    triton=backend.Support(backend.FLOATS, ("latent_attention_decode", "latent_attention_step")),
)

# ---- the public functions --------------------------------------------------------------------------------------------


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    *,
    cu_seqlens: Tensor,
    visibility: str,
    scale: float,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of packed sentences: each over its own memory slots and its own tokens. Differentiable.

    Args:
        q: [T, H, D], the packed sentences' queries; fp32, fp16, bf16 or fp64, any strides. D is 1 to 256.
        k, v: [T, Hkv, D], H a multiple of Hkv (grouped-query attention: query head h reads kv head h // (H / Hkv)).
        memory_k, memory_v: [B, Hkv, M, D], sentence b's slots; any strides, expanded views included; both None for
            plain causal attention.
        cu_seqlens: int32 [B + 1], sentence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of q, k and v; empty ones are
            allowed.
        visibility: "prefix", "rolling" or "interleaved": who sees what, as in ``visibility.py``. The last two need M >=
            the longest sentence.
        scale: the factor on q . k, usually D ** -0.5.
        max_seqlen: the longest sentence's length or a bound on it: saves CUDA from launching for sentences of T tokens.
        window: a token sees the last ``window`` cache positions up to and including its own (``visibility.py``).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: [H], a score of each head's own that enters every softmax's sum and gives nothing (gpt-oss); differentiable.

    Returns:
        [T, H, D], in the dtype of q. Arithmetic is fp32 for half types. Every gradient is deterministic; saved for the
        backward are the output and two numbers a row.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit. The values of ``cu_seqlens`` are
            checked on the CPU only; on CUDA that would wait for the device.
        BackendError: when a forced backend cannot run.
    """
    check_tensors(q=q, k=k, v=v, memory_k=memory_k, memory_v=memory_v, cu_seqlens=cu_seqlens)
    refuse_vmap("latent_attention", q, k, v, memory_k, memory_v, cu_seqlens)
    q, k, v, memory_k, memory_v = autocast(q.device.type, q, k, v, memory_k, memory_v)
    check_packed(q, k, v, memory_k, memory_v, cu_seqlens, visibility, scale, max_seqlen, window, softcap)
    if sinks is not None:
        check_sinks(sinks, q)
    given = (q, k, v, memory_k, memory_v)
    facts: dict[str, Any] = dict(tangents(*given))
    facts |= flash.facts(
        backend.current(), q, v.shape[-1], visibility=visibility, max_seqlen=max_seqlen, softcap=softcap,
        sinks=sinks is not None, graded=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given),
    )  # fmt: skip
    choice = backend.choose("latent_attention", q, **facts)
    if choice == "flash":
        assert max_seqlen is not None
        return flash.latent_attention(
            *given, cu_seqlens=cu_seqlens, scale=scale, max_seqlen=max_seqlen, window=window, softcap=softcap
        )
    if choice != "reference":
        options = (visibility_code(visibility), float(scale), max_seqlen, window, softcap)
        if sinks is not None:
            return latent_attention_with_sinks(choice, sinks, options, q, k, v, memory_k, memory_v, cu_seqlens)
        return primitives(choice, q).latent_attention_fwd(q, k, v, memory_k, memory_v, cu_seqlens, *options)[0]
    slots = 0 if memory_k is None else memory_k.shape[2]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        max_seqlen = check_offsets(cu_seqlens, q.shape[0], slots, visibility, max_seqlen)
    return reference.latent_attention(
        q,
        k,
        v,
        memory_k,
        memory_v,
        cu_seqlens=cu_seqlens,
        visibility=visibility,
        scale=scale,
        max_seqlen=max_seqlen,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def latent_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One decoding step: one query per row over that row's visible cache positions. Not differentiable: for generation.

    Args:
        q: [B, H, D]; fp32, fp16, bf16 or fp64, any strides. D is 1 to 256.
        k_cache, v_cache: [B, Hkv, N, D], any strides, laid out as ``visibility.py`` says: whatever the rule, what the
            newest token sees is positions 0 to lengths - 1. What lies beyond is never used, be it Inf or NaN.
        lengths: int32 or int64 [B], 0 to N; a row of length 0 gives zeros.
        scale, window, softcap: as in ``latent_attention``; the window keeps the last ``window`` visible positions.
        sinks: as in ``latent_attention``; no compiled backend has them yet, so with them plain torch computes.

    Returns:
        [B, H, D], in the dtype of q.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit, and for a tensor that requires a
            gradient where gradients are recorded. The values of ``lengths`` are checked on the CPU only.
        BackendError: when a forced backend cannot run.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    refuse_vmap("latent_attention_decode", q, k_cache, v_cache, lengths)
    refuse_gradients("latent_attention_decode", q=q, k_cache=k_cache, v_cache=v_cache)
    q, k_cache, v_cache = autocast(q.device.type, q, k_cache, v_cache)
    check_decode(q, k_cache, v_cache, lengths, scale, window, softcap)
    if sinks is not None:
        check_sinks(sinks, q)
    choice = "reference" if sinks is not None else backend.choose("latent_attention_decode", q)
    if choice != "reference":
        run = primitives(choice, q).latent_attention_decode
        return run(q, k_cache, v_cache, lengths, float(scale), window, softcap)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_lengths(lengths, k_cache.shape[2])
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    return reference.latent_attention_decode(q, k_cache, v_cache, lengths, **options)


def latent_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`latent_attention_decode` after the new token's key and value were written to the cache. Not differentiable.

    Args:
        q, k_cache, v_cache, lengths, scale, window, softcap, sinks: as for `latent_attention_decode`.
        k, v: [B, Hkv, D], any strides, in the dtype of the caches, which they are written to in place.
        positions: int64 [B], where each row's token goes, 0 to N - 1.

    Returns and raises as `latent_attention_decode`; ValueError, TypeError also for k, v and positions that do not fit, and
    for caches whose elements share memory (expanded ones). Nothing is written where it raises.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, positions=positions, lengths=lengths)
    check_decode(q, k_cache, v_cache, lengths, scale, window, softcap)
    check_new_token(k, v, k_cache, positions)
    refuse_vmap("latent_attention_step", q, k, v, k_cache, v_cache)
    refuse_gradients("latent_attention_step", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    check_written(k_cache=k_cache, v_cache=v_cache)
    choice = "reference" if sinks is not None else backend.choose("latent_attention_decode", q)
    if choice != "reference":
        out = primitives(choice, q).latent_attention_step(
            q, k, v, k_cache, v_cache, positions, lengths, float(scale), window, softcap
        )
        written(k_cache, v_cache)
        return out
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # before anything is written
        check_positions(positions, k_cache.shape[2])
        check_lengths(lengths, k_cache.shape[2])
    rows = torch.arange(q.shape[0], device=q.device)
    k_cache[rows, :, positions], v_cache[rows, :, positions] = k, v
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    return latent_attention_decode(q, k_cache, v_cache, lengths, **options)
