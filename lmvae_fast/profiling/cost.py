"""FLOPs and bytes of whatever runs: torch's own formulas, and ours for the ops it does not know.

A multiplication with its addition counts as two FLOPs; only matrix products and attention count, as in torch's counter.
``FORMULAS`` can be handed to ``torch.utils.flop_counter.FlopCounterMode(custom_mapping=FORMULAS)`` as well.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import lmvae_fast.kernels.greedy_head
import lmvae_fast.kernels.latent_attention
import lmvae_fast.kernels.latent_kv
import lmvae_fast.kernels.lm_head_loss  # noqa: F401  (the ops must be registered before they can have a formula)
from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES, visible_slots, visible_tokens
from lmvae_fast.kernels.packed_linear.reference import ACTIVATIONS

Formula = Callable[..., int]


@functools.cache
def attention_pairs(tokens: int, slots: int, visibility: str, window: int | None = None) -> int:
    """Pairs (query, key) of one sentence: what its tokens see of the slots and of each other."""
    return sum(
        len(visible_slots(i, slots, visibility, window)) + len(visible_tokens(i, slots, visibility, window))
        for i in range(tokens)
    )


def _packed_pairs(q: Tensor, memory_k: Tensor | None, cu_seqlens: Tensor, rule: int, window: int | None) -> int:
    """Pairs of a packed batch; on the meta device, where lengths have no values, its sentences are taken as equal."""
    sentences = cu_seqlens.shape[0] - 1
    if cu_seqlens.is_meta:
        lengths = [q.shape[0] // sentences] * sentences if sentences else []
    else:
        lengths = cu_seqlens.diff().tolist()
    slots = 0 if memory_k is None else memory_k.shape[2]
    return sum(attention_pairs(length, slots, VISIBILITIES[rule], window) for length in lengths)


def _attention_fwd(q, k, v, memory_k, memory_v, cu_seqlens, rule, scale, longest, window, softcap, **_: Any) -> int:
    return 4 * q.shape[1] * q.shape[2] * _packed_pairs(q, memory_k, cu_seqlens, rule, window)


def _attention_bwd(
    grad_out, q, k, v, memory_k, memory_v, out, stats, cu_seqlens, rule, scale, longest, window, softcap, **_: Any
) -> int:
    # scores again, and the gradients of probabilities, values, queries and keys
    return 10 * q.shape[1] * q.shape[2] * _packed_pairs(q, memory_k, cu_seqlens, rule, window)


def _attention_decode(q, k_cache, v_cache, lengths, *rest: Any, **_: Any) -> int:
    seen = k_cache.shape[2] * len(lengths) if lengths.is_meta else int(lengths.sum())
    return 4 * q.shape[1] * q.shape[2] * seen


def _attention_step(q, k, v, k_cache, v_cache, positions, lengths, *rest: Any, **_: Any) -> int:
    return _attention_decode(q, k_cache, v_cache, lengths, *rest)


def _kv_fwd(z, weight, *rest: Any, **_: Any) -> int:
    return 2 * z.shape[0] * weight.numel()


def _kv_bwd(grad, z, weight, dropout, seed, need_z, need_weight, need_bias, **_: Any) -> int:
    return 2 * z.shape[0] * weight.numel() * (need_z + need_weight)


def _kv_norm(weight, grads, zs, *rest: Any, **_: Any) -> int:
    rank, nz = sum(z.shape[0] for z in zs), weight.shape[-1]
    return 2 * rank * rank * (weight.numel() // nz + nz)


def _kv_adamw(weight, exp_avg, exp_avg_sq, grads, zs, *rest: Any, **_: Any) -> int:
    return 2 * sum(z.shape[0] for z in zs) * weight.numel()


def _head(hidden, weight, labels, bias, weights, cap, factor, chunk, want_hidden, want_weight, *rest, **_: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel() * (1 + want_hidden + want_weight)


def _linear(x, *rest: Any, out_val: Tensor, **_: Any) -> int:
    return 2 * x.numel() * out_val.shape[-1]  # a weight in oneDNN's layout, or one more tensor before it


def _packed_linear(x, packed, bias, residual, activation, out_features, **_: Any) -> int:
    return 2 * x.numel() * out_features * (2 if ACTIVATIONS[activation] == "swiglu" else 1)


def _packed_linear_int8(x, values, scales, totals, *rest: Any, **named: Any) -> int:
    return _packed_linear(x, values, *rest, **named)


def _greedy_head(hidden, weight, *rest: Any, **_: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel()


def _formulas() -> dict[Any, Formula]:
    ours: dict[str, Formula] = {
        "latent_attention_fwd": _attention_fwd,
        "latent_attention_bwd": _attention_bwd,
        "latent_attention_decode": _attention_decode,
        "latent_attention_step": _attention_step,
        "latent_kv_fwd": _kv_fwd,
        "latent_kv_out": _kv_fwd,
        "latent_kv_bwd": _kv_bwd,
        "latent_kv_norm": _kv_norm,
        "latent_kv_adamw": _kv_adamw,
        "lm_head_loss_fwd": _head,
        "packed_linear": _packed_linear,
        "packed_linear_int8": _packed_linear_int8,
        "greedy_head": _greedy_head,
    }
    by_op: dict[Any, Formula] = {}
    for space in (torch.ops.lmvae_fast, torch.ops.lmvae_fast_interpret):
        by_op |= {getattr(space, name): formula for name, formula in ours.items() if hasattr(space, name)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        by_op[torch.ops.mkldnn._linear_pointwise] = _linear
    for formula in ours.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # torch's counter then passes tensors, not shapes
    _linear._get_raw = True  # type: ignore[attr-defined]
    return by_op


FORMULAS = _formulas()
_ALL = {**flop_registry, **FORMULAS}
# What only makes another view of a tensor moves no bytes.
_VIEWS = {"aten::detach", "aten::alias", "aten::lift_fresh"}
# Arguments of which an op reads a few rows at most: greedy_head goes by the panels, and looks doubtful tokens up.
_SPARSELY_READ = {f"{space}::greedy_head": 1 for space in ("lmvae_fast", "lmvae_fast_interpret")}


class Cost(TorchDispatchMode):
    """Counts FLOPs and bytes (inputs read and outputs written, op by op) of what runs below it, part by part.

    part: called once per op, names the part it belongs to. ``flops`` and ``bytes`` are by part; bytes are what the ops
    would move with no cache between them: an upper bound of the traffic.
    """

    def __init__(self, part: Callable[[], str] = lambda: "all") -> None:
        super().__init__()
        self.part = part
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        part = self.part()
        formula = _ALL.get(func._overloadpacket)
        if formula is not None:
            self.flops[part] += int(formula(*args, **kwargs, out_val=out))
        if not func.is_view and func._schema.name not in _VIEWS:
            skipped = _SPARSELY_READ.get(func._schema.name)
            read = [arg for place, arg in enumerate(args) if place != skipped]
            tensors = [leaf for leaf in tree_leaves((read, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes[part] += sum(t.numel() * t.element_size() for t in tensors)
        return out
