"""Launchers of latent_attention's Triton kernels, their configurations, and what the compile gate builds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..launch import MAX_GRID, TRITON_TYPES, CompileCase, Config, launch
from ..row_product.ways import begins_early
from .checks import check_lengths, check_offsets, check_positions
from .triton_decode import latent_attention_combine_kernel, latent_attention_decode_kernel
from .triton_kernels import latent_attention_bwd_kernel, latent_attention_fwd_kernel
from .visibility import INTERLEAVED, PREFIX, ROLLING, VISIBILITIES

_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# By the power of two that holds head_dim: the most rows of a block, the keys of a block, warps, and the bound on registers
# that keeps the assembler from spilling. fp32 is multiplied without tensor cores (TF32 would break the error rule), whose
# operands live in registers: smaller blocks.
_FWD = {
    16: (64, 64, 4, 255),
    32: (64, 64, 4, 255),
    64: (32, 64, 8, 192),
    128: (64, 32, 8, None),
    256: (32, 16, 8, 255),
}
_BWD = {
    16: (64, 32, 4, None),
    32: (32, 32, 4, 255),
    64: (32, 32, 8, 255),
    128: (32, 16, 8, 255),
    256: (16, 16, 8, 255),
}
_FWD_FP32 = {
    16: (32, 32, 4, 255),
    32: (32, 32, 4, 255),
    64: (16, 32, 4, 255),
    128: (16, 16, 4, 255),
    256: (16, 16, 4, 255),
}
_BWD_FP32 = {
    16: (32, 32, 4, 255),
    32: (32, 32, 4, None),
    64: (16, 32, 8, 255),
    128: (16, 16, 8, 255),
    256: (16, 16, 8, 255),
}
# grad_q alone, of long sentences
_BWD_QUERIES = {
    16: (64, 32, 4, 168),
    32: (64, 32, 4, None),
    64: (32, 32, 4, 248),
    128: (32, 32, 8, 255),
    256: (16, 16, 8, None),
}
# Of 128 columns Triton 3.6 spills without a bound, later ones with any.
_BOUND_128 = 216 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else None
_BWD_QUERIES_FP32 = {
    16: (32, 32, 4, None),
    32: (32, 32, 4, None),
    64: (16, 32, 8, 255),
    128: (16, 16, 8, _BOUND_128),
    256: (16, 16, 8, 255),
}
_DECODE = {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (16, 4), 256: (16, 4)}  # keys, warps

# Decoding is split from so many cache positions on, into parts of so many at least, until two programs stand ready for each
# of an H200's 132 multiprocessors. Below that, a second launch costs more than it brings.
_SPLIT_FROM, _SPLIT_POSITIONS, _PROGRAMS, _MAX_SPLITS = 1024, 256, 264, 32


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _config(table: dict, head_dim: int, rows: int) -> Config:
    """rows: of the longest sentence; shorter blocks for shorter sentences."""
    block_d = _block_d(head_dim)
    most, keys, warps, registers = table[block_d]
    block_m = min(most, max(16, triton.next_power_of_2(max(1, rows))))
    sizes = {"BLOCK_M": block_m, "BLOCK_N": keys, "BLOCK_D": block_d}
    return Config(sizes, num_warps=warps, max_registers=registers)


def _in_one_pass(dtype: torch.dtype, config: Config) -> bool:
    """Whether a program can make all gradients of a short sentence: three sums of 256 fp32 columns do not fit in registers."""
    return dtype != torch.float32 or config.constants["BLOCK_D"] < 256


def _decode_config(block_d: int, crowded: bool = False) -> Config:
    """crowded: a step in fp32 of query heads that share wide keys, which four warps have not the registers for (Triton 3.6)."""
    keys, warps = _DECODE[block_d]
    if crowded and block_d >= 128:
        warps *= block_d // 64
    return Config({"BLOCK_N": keys, "BLOCK_D": block_d}, num_warps=warps, max_registers=255)


def _combine_config(block_d: int) -> Config:
    return Config({"BLOCK_S": _MAX_SPLITS, "BLOCK_D": block_d}, num_warps=4)


def _dot_type(x: torch.Tensor) -> tl.dtype:
    return _DOT[x.dtype] if x.is_cuda else tl.float32  # the interpreter multiplies half types wrongly


def _bound(q, cu_seqlens, slots: int, visibility: int, max_seqlen: int | None) -> int:
    """The longest sentence, or a bound on it: CUDA is not waited for."""
    if not q.is_cuda:
        return check_offsets(cu_seqlens, q.shape[0], slots, VISIBILITIES[visibility], max_seqlen)
    # Not cut at the number of slots: rows of a sentence that outgrows them would stay unwritten, without an error.
    return q.shape[0] if max_seqlen is None else min(max_seqlen, q.shape[0])


def _grid(pairs: int, blocks: int) -> tuple[int, int, int]:
    """Programs for every block of every (sentence, kv head): without max_seqlen that is blocks of all T tokens, more than a
    grid's second axis takes from some two million rows on."""
    rounds = triton.cdiv(blocks, MAX_GRID[1])
    return pairs, triton.cdiv(blocks, max(1, rounds)), rounds


def _memory(q, memory):
    """memory's tensor (q stands in for a missing one: no slot is read), its strides and its slots."""
    if memory is None:
        return q, (0, 0, 0, 0), 0
    return memory, memory.stride(), memory.shape[2]


def latent_attention_fwd(
    q, k, v, memory_k, memory_v, cu_seqlens, visibility, scale, max_seqlen, window, softcap
):  # fmt: skip
    """The Triton form of lmvae_fast::latent_attention_fwd."""
    tokens, heads, head_dim = q.shape
    kv_heads, batch = k.shape[1], cu_seqlens.numel() - 1
    memory_k, mk_strides, slots = _memory(q, memory_k)
    memory_v, mv_strides, _ = _memory(q, memory_v)
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    stats = torch.empty((tokens, heads, 2), dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    rows = _bound(q, cu_seqlens, slots, visibility, max_seqlen) * group
    config = _config(_FWD_FP32 if q.dtype == torch.float32 else _FWD, head_dim, rows)
    launch(
        latent_attention_fwd_kernel, _grid(batch * kv_heads, triton.cdiv(rows, config.constants["BLOCK_M"])), q.device, config,
        q, k, v, memory_k, memory_v, cu_seqlens.contiguous(), out, stats, heads, kv_heads, slots, head_dim,
        scale, window or 0, softcap or 0.0, *q.stride(), *k.stride(), *v.stride(), *mk_strides, *mv_strides,
        VISIBILITY=visibility, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, GROUP=group,
        EXACT=q.dtype == torch.float32, DOT=_dot_type(q),
    )  # fmt: skip
    return out, stats


def latent_attention_bwd(
    grad_out, q, k, v, memory_k, memory_v, out, stats, cu_seqlens, visibility, scale, max_seqlen, window, softcap
):
    """The Triton form of lmvae_fast::latent_attention_bwd."""
    _, heads, head_dim = q.shape
    kv_heads, batch = k.shape[1], cu_seqlens.numel() - 1
    memory_shape = (0,) if memory_k is None else tuple(memory_k.shape)
    shapes = (tuple(q.shape), (2, *k.shape), (2, *memory_shape))
    grad_q, grad_kv, grad_memory = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)
    memory_k, mk_strides, slots = _memory(q, memory_k)
    memory_v, mv_strides, _ = _memory(q, memory_v)
    group = heads // kv_heads
    longest = _bound(q, cu_seqlens, slots, visibility, max_seqlen)
    exact, rows = q.dtype == torch.float32, longest * group
    config = _config(_BWD_FP32 if exact else _BWD, head_dim, rows)
    # (configuration, programs per pair, makes gradients of queries?, of keys?)
    passes = [(config, 1, True, True)]
    if rows > config.constants["BLOCK_M"] or not _in_one_pass(q.dtype, config):
        for_queries = _config(_BWD_QUERIES_FP32 if exact else _BWD_QUERIES, head_dim, rows)
        query_blocks = triton.cdiv(rows, for_queries.constants["BLOCK_M"])
        key_blocks = sum(triton.cdiv(n, config.constants["BLOCK_N"]) for n in (slots, longest))
        passes = [(for_queries, query_blocks, True, False), (config, key_blocks, False, True)]
    for config, programs, queries, keys in passes:
        launch(
            latent_attention_bwd_kernel, _grid(batch * kv_heads, programs), q.device, config,
            grad_out, q, k, v, memory_k, memory_v, cu_seqlens.contiguous(), out, stats,
            grad_q, *grad_kv, *grad_memory, heads, kv_heads, slots, head_dim, scale, window or 0, softcap or 0.0,
            *grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *mk_strides, *mv_strides,
            VISIBILITY=visibility, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, GROUP=group,
            EXACT=exact, DOT=_dot_type(q), QUERIES=queries, KEYS=keys,
        )  # fmt: skip
    return grad_q, grad_kv, grad_memory


def decode_splits(positions: int, pairs: int) -> int:
    """How many programs share the cache of one (row, kv head): from shapes alone, as nothing may wait for the lengths."""
    if positions < _SPLIT_FROM:
        return 1
    return max(1, min(_MAX_SPLITS, positions // _SPLIT_POSITIONS, _PROGRAMS // max(1, pairs)))


def latent_attention_decode(q, k_cache, v_cache, lengths, scale, window, softcap):
    """The Triton form of lmvae_fast::latent_attention_decode."""
    return _decode(q, None, None, k_cache, v_cache, None, lengths, scale, window, softcap)


def latent_attention_step(q, k, v, k_cache, v_cache, positions, lengths, scale, window, softcap):
    """The Triton form of lmvae_fast::latent_attention_step: one launch writes the new token and attends to it."""
    if not q.is_cuda:
        check_positions(positions, k_cache.shape[2])
    return _decode(q, k, v, k_cache, v_cache, positions, lengths, scale, window, softcap)


def _decode(q, k, v, k_cache, v_cache, places, lengths, scale, window, softcap):
    batch, heads, head_dim = q.shape
    kv_heads, positions = k_cache.shape[1], k_cache.shape[2]
    if not q.is_cuda:
        check_lengths(lengths, positions)
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    block_d = _block_d(head_dim)
    group, exact = heads // kv_heads, q.dtype == torch.float32
    splits = decode_splits(positions if window is None else min(window, positions), batch * kv_heads)
    partial, stats = out, out
    if splits > 1:
        partial = torch.empty((batch * heads, splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((batch * heads, splits, 2), dtype=torch.float32, device=q.device)
    config = _decode_config(block_d, exact and group > 1 and places is not None)
    dependent = places is not None and begins_early(q.device)
    launch(
        latent_attention_decode_kernel, (batch * kv_heads, splits), q.device, replace(config, dependent=dependent),
        q, k_cache, v_cache, lengths, out, partial, stats,
        *((q, q, lengths) if places is None else (k, v, places)), positions,
        heads, kv_heads, head_dim, scale, window or 0, softcap or 0.0,
        *q.stride(), *k_cache.stride(), *v_cache.stride(), lengths.stride(0),
        *((0, 0, 1) * 2 if places is None else (*k.stride(), *v.stride())), 0 if places is None else places.stride(0),
        STEP=places is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, GROUP=group,
        GROUP_BLOCK=1 if group == 1 else max(16, triton.next_power_of_2(group)), EXACT=exact, SPLIT=splits > 1,
        DOT=_dot_type(q), DEPENDENT=dependent,
    )  # fmt: skip
    if splits > 1:
        launch(
            latent_attention_combine_kernel, (batch * heads,), q.device, _combine_config(block_d),
            partial, stats, out, splits, head_dim, EXACT=exact,
        )  # fmt: skip
    return out


# ---- compile gate ----------------------------------------------------------------------------------------------------

_SIZES = {"heads": "i32", "kv_heads": "i32", "slots": "i32", "head_dim": "i32", "window": "i32"}
_SIZES |= {"scale": "fp32", "softcap": "fp32", "cu_seqlens": "*i32", "stats": "*fp32"}
_STRIDES = {f"stride_{x}_{axis}": 1 if axis == "d" else "i32" for x in "qkvg" for axis in "thd"}
_STRIDES |= {f"stride_{x}_{axis}": 1 if axis == "d" else "i32" for x in ("mk", "mv") for axis in "bhmd"}
_TENSORS = ("q", "k", "v", "memory_k", "memory_v", "out", "grad_out", "grad_q", "grad_k", "grad_v", "grad_memory_k",
            "grad_memory_v")  # fmt: skip


def _compile_cases() -> list[CompileCase]:
    """Every configuration in every dtype with the plainest rule; the other rules, windows and soft caps at one width; query
    heads that share a kv head (Llama's 4 x 64, Qwen's 8 x 128) in full blocks at the widths that such decoders have."""
    cases = []
    variants = [(PREFIX, False, False), (ROLLING, False, False), (INTERLEAVED, True, True)]  # rule, window, softcap
    for dtype, name in TRITON_TYPES.items():
        exact = dtype == torch.float32
        signature = {**_SIZES, **_STRIDES, **dict.fromkeys(_TENSORS, f"*{name}")}
        # kernel, table, what a program makes, and is the block as small as the longest sentence allows, or always full?
        forward, backward = latent_attention_fwd_kernel, latent_attention_bwd_kernel
        tables = (_FWD_FP32, _BWD_FP32, _BWD_QUERIES_FP32) if exact else (_FWD, _BWD, _BWD_QUERIES)
        uses = {
            "fwd": (forward, tables[0], {}, True),
            "bwd-all": (backward, tables[1], {"QUERIES": True, "KEYS": True}, True),
            "bwd-q": (backward, tables[2], {"QUERIES": True, "KEYS": False}, False),
            "bwd-kv": (backward, tables[1], {"QUERIES": False, "KEYS": True}, False),
        }
        for (made, (kernel, table, more, adapts)), head_dim in itertools.product(uses.items(), _FWD):
            most = table[head_dim][0]
            blocks = [rows for rows in (16, 32, 64) if rows <= most] if adapts else [most]
            rules = variants if head_dim == 64 and dtype != torch.float16 else variants[:1]
            shared = (2, 4, 8) if head_dim in (64, 128, 256) and dtype != torch.float16 else ()
            uses_of_a_rule = [(rows, *rule, 1) for rows, rule in itertools.product(blocks, rules)]
            uses_of_a_rule += [(most, *variants[0], group) for group in shared]
            for rows, visibility, window, softcap, group in uses_of_a_rule:
                options = {"VISIBILITY": visibility, "HAS_WINDOW": window, "HAS_SOFTCAP": softcap, "GROUP": group}
                options |= {"EXACT": exact, "DOT": _DOT[dtype], **more}
                only = {n: t for n, t in signature.items() if n in kernel.arg_names}
                tag = f"{made}-{name}-{head_dim}-rows{rows}-{VISIBILITIES[visibility]}"
                tag += f"-group{group}" if group > 1 else ""
                config = _config(table, head_dim, rows)
                if made == "bwd-all" and not _in_one_pass(dtype, config):
                    continue
                cases.append(CompileCase(tag, kernel, only, config, options, tensor_cores=not exact))
        for head_dim in _DECODE:
            decode = latent_attention_decode_kernel
            strides = {n: 1 if n.endswith("_d") else "i32" for n in decode.arg_names if n.startswith("stride_")}
            only = {n: t for n, t in {**signature, **strides}.items() if n in decode.arg_names}
            only |= {"k_cache": f"*{name}", "v_cache": f"*{name}", "lengths": "*i64"}
            config = _decode_config(head_dim)
            only |= {"partial": "*fp32", "stats": "*fp32", "new_k": f"*{name}", "new_v": f"*{name}", "places": "*i64"}
            only["cached"] = "i32"
            for group in (1, 2, 4, 8) if head_dim in (64, 128, 256) and dtype == torch.bfloat16 else (1, 4):
                for split, step in ((False, False), (True, False), (False, True), (True, True)):
                    options = {"HAS_WINDOW": group == 4, "HAS_SOFTCAP": group == 4, "GROUP": group, "EXACT": exact}
                    options |= {
                        "GROUP_BLOCK": 1 if group == 1 else 16,
                        "SPLIT": split,
                        "DOT": _DOT[dtype],
                        "STEP": step,
                    }
                    tag = f"{'step' if step else 'decode'}-{name}-{head_dim}-group{group}" + ("-split" if split else "")
                    tensor_cores = group > 1 and not exact
                    config = _decode_config(head_dim, exact and group > 1 and step)
                    for dependent in (False, True) if step else (False,):
                        name_of = tag + ("-dependent" if dependent else "")
                        given = replace(config, dependent=dependent), options | {"DEPENDENT": dependent}
                        cases.append(CompileCase(name_of, decode, only, *given, tensor_cores=tensor_cores))
            combine = {"partial": "*fp32", "stats": "*fp32", "out": f"*{name}", "splits": "i32", "head_dim": "i32"}
            config, options = _combine_config(head_dim), {"EXACT": exact}
            tag = f"combine-{name}-{head_dim}"
            cases.append(CompileCase(tag, latent_attention_combine_kernel, combine, config, options))
    return cases


COMPILE_CASES = _compile_cases()
