"""latent_attention_decode on CUDA: the visible cache of a (row, kv head) is read once, for all its query heads.

By one program, or, where a long cache and few rows would leave most of the device idle, by several, each of which leaves
its maximum, sum and weighted values for a second kernel to combine in a fixed order (flash-decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_math import cast, divided_program, tanh_
from .triton_kernels import _exp


@triton.jit
def latent_attention_decode_kernel(
    q, k_cache, v_cache, lengths, out, partial, stats, new_k, new_v, places, cached,
    heads, kv_heads, head_dim, scale, window, softcap,
    stride_q_b, stride_q_h, stride_q_d, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    stride_v_b, stride_v_h, stride_v_n, stride_v_d, stride_lengths,
    stride_nk_b, stride_nk_h, stride_nk_d, stride_nv_b, stride_nv_h, stride_nv_d, stride_places,
    STEP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    EXACT: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # GROUP_BLOCK 1: products by multiplication and sum; otherwise a tile of query heads (16 at least) for tl.dot.
    # STEP: the row's new key and value go to its place in the cache; every program has them from where they come.
    # SPLIT: program_id(1) says which part of the visible positions; the parts are equal, so short rows keep all programs busy.
    b, h = divided_program(kv_heads)
    if DEPENDENT:
        gdc_wait()  # for all that is read: any of it may be what the kernel before this one writes
        gdc_launch_dependents()  # the product behind it asks for its weight meanwhile
    length = tl.load(lengths + b * stride_lengths).to(tl.int64)
    low = tl.zeros_like(length)
    if HAS_WINDOW:
        low = tl.maximum(low, length - window)
    stop = length
    if SPLIT:
        positions = (length - low).to(tl.int32)  # 64-bit division is a call
        share = (positions + tl.num_programs(1) - 1) // tl.num_programs(1)
        share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        low += tl.program_id(1).to(tl.int64) * share
        stop = tl.minimum(length, low + share)
    g = tl.arange(0, GROUP_BLOCK)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    d_ok = d < head_dim
    head = h * GROUP + g
    g_ok = g < GROUP
    at = q + b * stride_q_b + head[:, None] * stride_q_h + d[None, :] * stride_q_d
    q_tile = tl.load(at, mask=g_ok[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    if STEP:
        place = tl.load(places + b * stride_places).to(tl.int64)
        own_k = tl.load(new_k + b * stride_nk_b + h * stride_nk_h + d * stride_nk_d, mask=d_ok, other=0.0)
        own_v = tl.load(new_v + b * stride_nv_b + h * stride_nv_h + d * stride_nv_d, mask=d_ok, other=0.0)
        # One program of a row's writes; a place outside the cache is nobody's memory.
        slot, part = place + tl.zeros_like(d), tl.program_id(1).to(tl.int64) + tl.zeros_like(d)
        writes = d_ok & (slot >= 0) & (slot < cached) & (part == 0)
        tl.store(k_cache + b * stride_k_b + h * stride_k_h + place * stride_k_n + d * stride_k_d, own_k, mask=writes)
        tl.store(v_cache + b * stride_v_b + h * stride_v_h + place * stride_v_n + d * stride_v_d, own_v, mask=writes)
    largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    acc = tl.zeros((GROUP_BLOCK, BLOCK_D), tl.float32)
    for start in range(low, stop, BLOCK_N):
        position = start + n
        ok = position < stop
        mask = ok[:, None] & d_ok[None, :]
        k_at = k_cache + b * stride_k_b + h * stride_k_h + position[:, None] * stride_k_n + d[None, :] * stride_k_d
        v_at = v_cache + b * stride_v_b + h * stride_v_h + position[:, None] * stride_v_n + d[None, :] * stride_v_d
        k = tl.load(k_at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        if STEP:
            is_new = (position == place)[:, None]
            k = tl.where(is_new, own_k.to(tl.float32)[None, :], k)
            v = tl.where(is_new, own_v.to(tl.float32)[None, :], v)
        if GROUP_BLOCK == 1:
            s = tl.sum(q_tile * k, 1)[None, :] * scale
        else:
            s = tl.dot(q_tile.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            s = tanh_(s / softcap) * softcap
        s = tl.where(ok[None, :], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = _exp(s - base[:, None], EXACT)
        rescale = _exp(largest - base, EXACT)
        total = total * rescale + tl.sum(p, 1)
        if GROUP_BLOCK == 1:
            acc = acc * rescale[:, None] + tl.sum(tl.trans(p) * v, 0)[None, :]
        else:
            acc = tl.dot(p.to(DOT), v.to(DOT), acc * rescale[:, None], input_precision="ieee")
        largest = new
    if SPLIT:
        part = (b * heads + head) * tl.num_programs(1) + tl.program_id(1).to(tl.int64)
        tl.store(partial + part[:, None] * head_dim + d[None, :], acc, mask=g_ok[:, None] & d_ok[None, :])
        tl.store(stats + part * 2, largest, mask=g_ok)
        tl.store(stats + part * 2 + 1, total, mask=g_ok)
    else:
        factor = tl.where(total == 0.0, 0.0, 1.0 / total)  # a row that holds nothing: zeros
        place = (b * heads + head)[:, None] * head_dim + d[None, :]
        tl.store(out + place, cast(acc * factor[:, None], out.dtype.element_ty), mask=g_ok[:, None] & d_ok[None, :])


@triton.jit
def latent_attention_combine_kernel(
    partial, stats, out, splits, head_dim, EXACT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] from its splits' running softmax: partial [rows, splits, head_dim], stats [rows, splits, 2]."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    s_ok, d_ok = s < splits, d < head_dim
    part = row * splits + s
    largest = tl.load(stats + part * 2, mask=s_ok, other=float("-inf"))
    total = tl.load(stats + part * 2 + 1, mask=s_ok, other=0.0)
    top = tl.max(largest, 0)
    weight = _exp(largest - tl.where(top == float("-inf"), 0.0, top), EXACT)
    at = partial + part[:, None] * head_dim + d[None, :]
    acc = tl.sum(weight[:, None] * tl.load(at, mask=s_ok[:, None] & d_ok[None, :], other=0.0), 0)
    total = tl.sum(weight * total, 0)
    y = acc * tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(out + row * head_dim + d, cast(y, out.dtype.element_ty), mask=d_ok)
