"""Device code of sample_token: one program owns a row and reads it a few times; nothing is sorted.

Sums of weights are exact in fp64 (reference.py says why), whatever the tree that adds them. Where a filter cuts is found
in three readings: a histogram of the scores says which of them may be kept, those (`KEPT` at most, in the order of the row)
are written side by side, and the rest happens in registers. A row that spreads over more tokens than that is searched by
bisection over all its scores, some twenty readings; both ends of the interval are moved to scores that occur.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_math import exp_, philox_words

#: A token with this x = ln(weight) or less weighs nothing: the unit of the sums is 2^-51 at least.
_LEAST = tl.constexpr(-37.0)
#: Stages of loops that only read: blocks of a row whose loads are under way at once, and the one that is computed.
_AHEAD = tl.constexpr(4)
_BINS = tl.constexpr(512)
_BINS_PER_UNIT = tl.constexpr(512 / 37.0)


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
    lane = tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = lane
    for start in tl.range(0, vocab, BLOCK, num_stages=2 if HAS_SEEN else _AHEAD):
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
    lane = tl.arange(0, BLOCK)
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
    lane = tl.arange(0, BLOCK)
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
def _bin(x):
    return tl.minimum((-x * _BINS_PER_UNIT).to(tl.int32), _BINS - 1)


@triton.jit
def _last_bin(
    logits, seen, vocab, stride_col, stride_seen, penalty, over_penalty, largest, inverse, top_k, top_p,
    HAS_SEEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(The bin of scores through which the row is to be kept, how many tokens that are). For top-k it holds the k-th; for
    top-p it should hold the cut with something to spare, which is looked at when the weights are summed."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((_BINS,), tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=2 if HAS_SEEN else _AHEAD):
        s = _scores(logits, seen, start + lane, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN)
        x = (s - largest) * inverse
        inside = x >= _LEAST
        counts += tl.histogram(_bin(tl.where(inside, x, 0.0)), _BINS, mask=inside)
    n = tl.arange(0, _BINS)
    if TOP_K:
        reached = tl.cumsum(counts, 0) >= top_k
    else:
        share = top_p.to(tl.float32)
        about = tl.exp((n.to(tl.float32) + 0.5) / -_BINS_PER_UNIT) * counts.to(tl.float32)
        reached = tl.cumsum(about, 0) >= (share + (1.0 - share) * 0.25) * tl.sum(about, 0)
    last = tl.min(tl.where(reached, n, _BINS - 1), 0)
    return last, tl.sum(tl.where(n <= last, counts, 0), 0)


@triton.jit
def _gather(
    logits, seen, kept_x, kept_col, vocab, stride_col, stride_seen, penalty, over_penalty, largest, inverse, magic, last,
    HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x and column of the tokens up to a bin side by side, in their order; returns what the whole row weighs."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    written = last * 0
    for start in range(0, vocab, BLOCK):
        col = start + lane
        s = _scores(logits, seen, col, vocab, stride_col, stride_seen, penalty, over_penalty, HAS_SEEN)
        x = (s - largest) * inverse
        inside = x >= _LEAST
        total += tl.where(inside, _weight(x, magic), 0.0)
        keep = inside & (_bin(tl.where(inside, x, 0.0)) <= last)
        place = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept_x + place, x, mask=keep)
        tl.store(kept_col + place, col, mask=keep)
        written += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of the program read them
    return tl.sum(total, 0)


@triton.jit
def _select_of(x, measure, need):
    """The largest x from which upwards `measure` sums to `need`, of few. Elements that measure 0 are none."""
    valid = measure > 0.0
    low = tl.min(tl.where(valid, x, 0.0), 0)
    high = low * 0.0
    passed = need * 0.0
    while low < high:
        pivot = low + (high - low) * 0.5
        pivot = tl.where(pivot > low, pivot, high)
        upper = tl.sum(tl.where((x >= pivot) & (x <= high), measure, 0.0), 0)
        enough = passed + upper >= need
        above = tl.min(tl.where(valid & (x >= pivot) & (x <= high), x, float("inf")), 0)
        below = tl.max(tl.where(valid & (x < pivot), x, float("-inf")), 0)
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
        passed = tl.where(enough, passed, passed + upper)
    return low


@triton.jit
def _target(seed, rows, steps, b, stride_rows, stride_steps, total):
    """A uniform of 48 bits times the total."""
    b = b.to(tl.int64)
    offset = tl.load(seed + 1) + tl.load(steps + b * stride_steps)
    x0, x1, _, _ = philox_words(tl.load(seed), offset, tl.load(rows + b * stride_rows))
    high_bits = ((x0 >> 8).to(tl.int64) << 24) + (x1 >> 8).to(tl.int64)
    return high_bits.to(tl.float64) * 3.552713678800501e-15 * total  # 2^-48


@triton.jit
def _draw_of_kept(
    kept_x, kept_col, count, row_total, vocab, magic, top_k, top_p, log_min_p, seed, rows, steps, b, stride_rows, stride_steps,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """(column drawn, or `vocab`; whether the tokens that were kept reach top_p, without which the draw means nothing)."""
    lane = tl.arange(0, KEPT)
    ok = lane < count
    x = tl.load(kept_x + lane, mask=ok, other=float("-inf"))
    weight = tl.where(ok, _weight(x, magic), 0.0)
    least = row_total.to(tl.float32) * 0.0 + float("-inf")
    if TOP_K:  # noqa: SIM102 (a constant and a run-time condition)
        if count > top_k:
            least = _select_of(x, ok.to(tl.float64), row_total * 0.0 + top_k)
    reaches = count >= 0
    if TOP_P:
        weight = tl.where(x >= least, weight, 0.0)
        of_kept = tl.sum(weight, 0)
        total = of_kept if TOP_K else row_total
        need = total * top_p
        reaches = of_kept >= need
        if reaches:
            least = tl.maximum(least, _select_of(x, weight, need))
    if MIN_P:
        least = tl.maximum(least, log_min_p)
    weight = tl.where(x >= least, weight, 0.0)
    target = _target(seed, rows, steps, b, stride_rows, stride_steps, tl.sum(weight, 0))
    col = tl.load(kept_col + lane, mask=ok, other=0)
    return tl.min(tl.where(ok & (tl.cumsum(weight, 0) > target), col, vocab), 0), reaches


@triton.jit
def _draw_by_search(
    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, top_k, top_p, log_min_p,
    seed, rows, steps, b, stride_rows, stride_steps, chosen,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Column drawn, or `vocab`: the cuts by bisection over the whole row. chosen: any column, whose type the result has."""
    lane = tl.arange(0, BLOCK)
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
            total * top_p, HAS_SEEN, True, BLOCK,
        )  # fmt: skip
    if MIN_P:
        least = tl.maximum(least, log_min_p)
    low, total = _survey(
        at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, least,
        HAS_SEEN, True, BLOCK,
    )  # fmt: skip
    target = _target(seed, rows, steps, b, stride_rows, stride_steps, total)
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
    return found


@triton.jit
def sample_token_kernel(
    logits, seed, rows, steps, seen, kept_x, kept_col, ids, logprob, vocab, inverse, top_k, top_p_bits, log_min_p,
    penalty, over_penalty, stride_b, stride_v, stride_rows, stride_steps, stride_seen_b, stride_seen_v,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, HAS_SEEN: tl.constexpr,
    LOGPROB: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = logits + b * stride_b
    mark = seen + b * stride_seen_b
    largest, chosen = _best(at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, HAS_SEEN, BLOCK)
    if not GREEDY:  # noqa: SIM102 (a constant and a run-time condition)
        if (largest > float("-inf")) & (largest < float("inf")):
            # 1.5 * 2^BITS, built from its bits
            magic = tl.full((), ((BITS + 1023) << 52) | (1 << 51), tl.int64).to(tl.float64, bitcast=True)
            # The bits of an fp64 number; of the least there is they are 1, which Triton makes a constant of.
            share = tl.full((), top_p_bits, tl.int64).to(tl.float64, bitcast=True)
            found = vocab + chosen * 0
            left = 1  # to be searched for in the whole row
            if TOP_K or TOP_P:
                last, count = _last_bin(
                    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, top_k, share,
                    HAS_SEEN, TOP_K, BLOCK,
                )  # fmt: skip
                if count <= KEPT:
                    x_of, col_of = kept_x + b * KEPT, kept_col + b * KEPT
                    row_total = _gather(
                        at, mark, x_of, col_of, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse,
                        magic, last, HAS_SEEN, BLOCK,
                    )  # fmt: skip
                    found, reaches = _draw_of_kept(
                        x_of, col_of, count, row_total, vocab, magic, top_k, share, log_min_p, seed, rows, steps, b,
                        stride_rows, stride_steps, TOP_K, TOP_P, MIN_P, KEPT,
                    )  # fmt: skip
                    left = tl.where(reaches, 0, 1)
            if left == 1:
                found = _draw_by_search(
                    at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, largest, inverse, magic, top_k, share,
                    log_min_p, seed, rows, steps, b, stride_rows, stride_steps, chosen,
                    TOP_K, TOP_P, MIN_P, HAS_SEEN, BLOCK,
                )  # fmt: skip
            chosen = tl.where(found < vocab, found, chosen)
    tl.store(ids + b, chosen.to(tl.int64))
    if LOGPROB:
        largest, _ = _best(at, mark, vocab, stride_v, stride_seen_v, penalty, over_penalty, False, BLOCK)
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, vocab, BLOCK):
            col = start + lane
            s = _scores(at, mark, col, vocab, stride_v, stride_seen_v, penalty, over_penalty, False)
            total += tl.where(col < vocab, exp_(s - largest).to(tl.float64), 0.0)
        own = tl.load(at + chosen.to(tl.int64) * stride_v).to(tl.float32)
        tl.store(logprob + b, ((own - largest).to(tl.float64) - tl.log(tl.sum(total, 0))).to(tl.float32))
