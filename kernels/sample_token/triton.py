"""sample_token on CUDA: one program owns a row and reads it from the cache some twenty times; nothing is sorted.

Where a filter cuts is found by bisection over the scores, and both ends of the interval are moved to scores that occur, so
that it ends when they meet. Sums of weights are exact in fp64 (reference.py says why), whatever the tree that adds them.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl

from ..launch import TRITON_TYPES, CompileCase, Config, launch
from ..triton_math import exp_, philox_words

# ---- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _scores(logits, seen, col, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN: tl.constexpr):
    """fp32 scores of some columns of a row, -inf beyond its end."""
    ok = col < vocab
    col = col.to(tl.int64)
    s = tl.load(logits + col * stride_col, mask=ok, other=float("-inf")).to(tl.float32)
    if HAS_SEEN:
        marked = tl.load(seen + col * stride_seen, mask=ok, other=0) != 0
        s = tl.where(marked, tl.where(s < 0, s * penalty, s * over_penalty), s)
    return s


@triton.jit
def _best(
    logits, seen, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr
):
    """(largest score, its first column); a NaN is larger than all, and then the score given is NaN."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = lane
    for start in range(0, vocab, BLOCK):
        col = start + lane
        s = _scores(logits, seen, col, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN)
        better = (s > value) | ((s != s) & (value == value))
        value = tl.where(better, s, value)
        place = tl.where(better, col, place)
    nan = value != value
    any_nan = tl.max(nan.to(tl.int32), 0) > 0
    top = tl.max(tl.where(nan, float("-inf"), value), 0)
    chosen = tl.where(any_nan, nan, value == top)
    index = tl.min(tl.where(chosen, place, vocab), 0)
    return tl.where(any_nan, float("nan"), top), index


@triton.jit
def _weight(x, magic):
    """e^x in fp64, rounded to the unit that makes sums exact."""
    return (exp_(x).to(tl.float64) + magic) - magic


@triton.jit
def _survey(
    logits, seen, vocab, stride_col, stride_seen, penalty, over_penalty, largest, inverse, magic, least,
    HAS_SEEN: tl.constexpr, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the finite x >= least: the smallest, and what they measure (their weight, or their number)."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    low = tl.full((BLOCK,), 0.0, tl.float32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab, BLOCK):
        s = _scores(logits, seen, start + lane, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN)
        x = (s - largest) * inverse
        inside = (x >= least) & (x > float("-inf"))
        low = tl.where(inside & (x < low), x, low)
        if BY_WEIGHT:
            total += tl.where(inside, _weight(x, magic), 0.0)
        else:
            total += inside.to(tl.float64)
    return tl.min(low, 0), tl.sum(total, 0)


@triton.jit
def _select(
    logits, seen, vocab, stride_col, stride_seen, penalty, over_penalty, largest, inverse, magic, low, need,
    HAS_SEEN: tl.constexpr, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest x from which upwards the row measures `need`. low: the smallest that may be it, and one that occurs."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    high = low * 0.0  # the largest x
    passed = need * 0.0  # what is above `high` measures
    while low < high:
        pivot = low + (high - low) * 0.5
        pivot = tl.where(pivot > low, pivot, high)
        upper = tl.zeros((BLOCK,), tl.float64)
        smallest_above = tl.full((BLOCK,), float("inf"), tl.float32)
        largest_below = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            s = _scores(logits, seen, start + lane, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN)
            x = (s - largest) * inverse
            above = (x >= pivot) & (x <= high)
            if BY_WEIGHT:
                upper += tl.where(above, _weight(x, magic), 0.0)
            else:
                upper += above.to(tl.float64)
            smallest_above = tl.where(above & (x < smallest_above), x, smallest_above)
            largest_below = tl.where((x < pivot) & (x > largest_below), x, largest_below)
        upper_sum = tl.sum(upper, 0)
        enough = passed + upper_sum >= need
        low = tl.where(enough, tl.min(smallest_above, 0), low)
        high = tl.where(enough, high, tl.max(largest_below, 0))
        passed = tl.where(enough, passed, passed + upper_sum)
    return low


@triton.jit
def sample_token_kernel(
    logits, seed, rows, steps, seen, ids, logprob, vocab, inverse, top_k, top_p, log_min_p, penalty, over_penalty,
    stride_b, stride_v, stride_rows, stride_steps, stride_seen_b, stride_seen_v,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, HAS_SEEN: tl.constexpr,
    LOGPROB: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    at = logits + b * stride_b
    mark = seen + b * stride_seen_b
    largest, chosen = _best(at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, HAS_SEEN, BLOCK)
    if not GREEDY:  # noqa: SIM102 (a constant and a run-time condition)
        if (largest > float("-inf")) & (largest < float("inf")):
            # 1.5 * 2^BITS, built from its bits; top_p arrives as the bits of an fp64 number
            magic = tl.full((), ((BITS + 1023) << 52) | (1 << 51), tl.int64).to(tl.float64, bitcast=True)
            least = largest * 0.0 + float("-inf")
            if TOP_K:
                low, count = _survey(
                    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, least,
                    HAS_SEEN, False, BLOCK,
                )  # fmt: skip
                if count > top_k:
                    least = _select(
                        at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, low,
                        count * 0.0 + top_k, HAS_SEEN, False, BLOCK,
                    )  # fmt: skip
            if TOP_P:
                low, total = _survey(
                    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic,
                    tl.maximum(least, -37.0), HAS_SEEN, True, BLOCK,
                )  # fmt: skip
                least = _select(
                    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, low,
                    total * top_p.to(tl.float64, bitcast=True), HAS_SEEN, True, BLOCK,
                )  # fmt: skip
            if MIN_P:
                least = tl.maximum(least, log_min_p)
            low, total = _survey(
                at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, least,
                HAS_SEEN, True, BLOCK,
            )  # fmt: skip
            offset = tl.load(seed + 1) + tl.load(steps + b * stride_steps)
            x0, x1, _, _ = philox_words(tl.load(seed), offset, tl.load(rows + b * stride_rows))
            high_bits = ((x0 >> 8).to(tl.int64) << 24) + (x1 >> 8).to(tl.int64)
            target = high_bits.to(tl.float64) * 3.552713678800501e-15 * total  # 2^-48
            running = total * 0.0
            found = vocab + chosen * 0
            start = 0
            while (start < vocab) & (found == vocab):
                col = start + lane
                s = _scores(at, mark, col, vocab, stride_v, stride_seen_v, penalty, over_penalty, HAS_SEEN)
                x = (s - largest) * inverse
                w = tl.where(x >= least, _weight(x, magic), 0.0)
                block = tl.sum(w, 0)
                if running + block > target:
                    found = tl.min(tl.where(running + tl.cumsum(w, 0) > target, col, vocab), 0)
                running += block
                start += BLOCK
            chosen = tl.where(found < vocab, found, chosen)
    tl.store(ids + b, chosen)
    if LOGPROB:
        largest, _ = _best(at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, False, BLOCK)
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, vocab, BLOCK):
            col = start + lane
            s = _scores(at, mark, col, vocab, stride_v, stride_seen_v, penalty, over_penalty, False)
            total += tl.where(col < vocab, exp_(s - largest).to(tl.float64), 0.0)
        own = tl.load(at + chosen * stride_v).to(tl.float32)
        tl.store(logprob + b, ((own - largest).to(tl.float64) - tl.log(tl.sum(total, 0))).to(tl.float32))


# ---- configuration and launcher --------------------------------------------------------------------------------------

_CONFIG = Config({"BLOCK": 1024}, num_warps=8, max_registers=128)


def sample_token(logits, seed, rows, steps, seen, greedy, temperature, top_k, top_p, min_p, penalty, logprob):
    """The Triton form of lmvae_fast::sample_token."""
    batch, vocab = logits.shape
    ids = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(batch if logprob else 0, dtype=torch.float32, device=logits.device)
    mark = (0, 0) if seen is None else (seen.stride(0), seen.stride(1))
    launch(
        sample_token_kernel, (batch,), logits.device, _CONFIG,
        logits, seed, rows, steps, ids if seen is None else seen, ids, logprobs if logprob else ids, vocab,
        1.0 / temperature, top_k, struct.unpack("<q", struct.pack("<d", top_p))[0],
        math.log(min_p) if min_p > 0.0 else -math.inf, penalty, 1.0 / penalty, logits.stride(0), logits.stride(1),
        rows.stride(0), steps.stride(0), *mark,
        GREEDY=greedy, TOP_K=0 < top_k < vocab, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0, HAS_SEEN=seen is not None,
        LOGPROB=logprob, BITS=vocab.bit_length(),
    )  # fmt: skip
    return ids, logprobs


# ---- compile gate ----------------------------------------------------------------------------------------------------


def _cases() -> list[CompileCase]:
    cases = []
    plain = {"TOP_K": False, "TOP_P": False, "MIN_P": False}
    modes = {
        "greedy": {"GREEDY": True, **plain},
        "draw": {"GREEDY": False, **plain},
        "top_p": {"GREEDY": False, **plain, "TOP_P": True},
        "all": {"GREEDY": False, "TOP_K": True, "TOP_P": True, "MIN_P": True},
    }
    for dtype in TRITON_TYPES.values():
        signature: dict[str, str | int] = {
            "logits": f"*{dtype}", "seed": "*i64", "rows": "*i64", "steps": "*i64", "seen": "*u8", "ids": "*i64",
            "logprob": "*fp32", "vocab": "i32", "inverse": "fp32", "top_k": "i32", "top_p": "i64",
            "log_min_p": "fp32", "penalty": "fp32", "over_penalty": "fp32", "stride_b": "i32", "stride_v": 1,
            "stride_rows": 1, "stride_steps": 1, "stride_seen_b": "i32", "stride_seen_v": 1,
        }  # fmt: skip
        for name, mode in modes.items():
            everything = name == "all"
            constants = {**mode, "HAS_SEEN": everything, "LOGPROB": everything, "BITS": 16}
            cases.append(CompileCase(f"{name}-{dtype}", sample_token_kernel, signature, _CONFIG, constants))
        one = {**signature, "vocab": 1, "top_k": 1}  # Triton makes a constant of what is 1
        constants = {**modes["all"], "HAS_SEEN": True, "LOGPROB": True, "BITS": 1}
        cases.append(CompileCase(f"one-token-{dtype}", sample_token_kernel, one, _CONFIG, constants))
    return cases


COMPILE_CASES = _cases()
