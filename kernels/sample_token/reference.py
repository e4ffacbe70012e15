"""sample_token in plain torch: the truth that every backend is held to.

With s the penalised logits of a row, m their maximum and x = (s - m) / temperature, a token weighs e^x, rounded to a
multiple of 2^-(52 - b) where b is the number of bits of the vocabulary's size. Sums of such weights are exact in fp64, so
they do not depend on the order of summation: backends can differ only through the last bit of an exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import philox


def penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Logits [B, V] in fp32 (fp64) with those of seen tokens times (negative) or over (positive) the penalty."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is None:
        return scores
    return torch.where(seen.bool(), torch.where(scores < 0, scores * penalty, scores * (1.0 / penalty)), scores)


def token_weights(x: Tensor) -> Tensor:
    """e^x of x [B, V] <= 0, rounded to where sums over a row are exact: fp64 [B, V]. NaN counts nothing."""
    magic = 1.5 * 2.0 ** x.shape[-1].bit_length()  # fp64 numbers from here on are multiples of the unit wanted
    return ((x.exp().double() + magic) - magic).nan_to_num(nan=0.0)


def cut(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The smallest x [B, 1] that the filters keep, of x [B, V]. Tokens of one x are kept or dropped together."""
    least = torch.full_like(x[:, :1], -math.inf)
    if top_k:
        least = x.topk(min(top_k, x.shape[-1]), dim=-1).values[:, -1:]
    if top_p < 1.0:
        ordered = x.masked_fill(x < least, -math.inf).sort(dim=-1, descending=True).values
        running = token_weights(ordered).cumsum(-1)
        reached = (running >= top_p * running[:, -1:]).byte().argmax(-1, keepdim=True)
        least = torch.maximum(least, ordered.gather(-1, reached))
    return least if min_p == 0.0 else least.clamp_min(math.log(min_p))


def uniform(seed: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
    """One uniform of 48 bits in [0, 1) a row: two words of block ``row`` of the stream (seed, offset + step). fp64 [B]."""
    words = philox.block_words(seed[0], seed[1] + steps, rows)
    return ((words[:, 0] >> 8).double() * 2.0**24 + (words[:, 1] >> 8).double()) * 2.0**-48


def sample_token(
    logits: Tensor, seed: Tensor, rows: Tensor, steps: Tensor, seen: Tensor | None, *, greedy: bool, temperature: float,
    top_k: int, top_p: float, min_p: float, penalty: float, logprob: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [B, V]; seed int64 [2]; rows, steps int64 [B]; seen [B, V] or None -> ids int64 [B], logprob fp32 [B] or [0]."""
    scores = penalised(logits, seen, penalty)
    ids = scores.argmax(-1)
    if not greedy:
        largest = scores.amax(-1, keepdim=True)
        x = (scores - largest) * (1.0 / temperature)
        weights = token_weights(x.masked_fill(x < cut(x, top_k, top_p, min_p), -math.inf))
        running = weights.cumsum(-1)
        target = uniform(seed, rows, steps).unsqueeze(-1) * running[:, -1:]
        # right=True: a uniform of 0 must not choose a token of weight 0 in front
        drawn = torch.searchsorted(running, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
        ids = torch.where(largest.squeeze(-1).isfinite(), drawn, ids)
    if not logprob:
        return ids, logits.new_empty(0, dtype=torch.float32)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return ids, wide.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1).float()
