"""Who sees what: the three visibility rules of latent attention, in one place.

A sentence has M memory slots (written from its latent) and S tokens. Zero-based token index i, slot index j:

    rule          slots seen by token i            tokens seen by token i   position id of token i
    prefix        all                              all <= i                 M + i
    rolling       j = 0 if i = 0, else 1..i        i - 1 and i              i + 1
    interleaved   j <= i                           all <= i                 2i + 1

Each rule describes what a step-by-step generation over one static KV cache sees, so everything has a *cache position*,
and the visible part of the cache is always positions 0..n-1:

    prefix        slot j at j; token i at M + i.
    interleaved   slot j at 2j; token i at 2i + 1.
    rolling       step 0: slot 0 at 0, token 0 at 1. Step i >= 1: slot i is written at i - 1, over the token i - 2 that
                  stood there, and token i at i + 1; so slots 1..i stand at 0..i-1, token i - 1 at i, token i at i + 1.

A token's position id (rotary or learned) is its cache position. A sliding window counts cache positions, as a KV cache
does: token i sees the last ``window`` positions up to and including its own.

Sources: prefix, Optimus (arXiv 2004.04092) and LlaMaVAE (arXiv 2312.13208); rolling, LangVAE 0.6 as released;
interleaved, LangVAE as its paper describes it (arXiv 2505.00004).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

VISIBILITIES = ("prefix", "rolling", "interleaved")
PREFIX, ROLLING, INTERLEAVED = range(3)  # the numbers that the compiled kernels know the rules by

Index = TypeVar("Index", int, Tensor)


def visibility_code(visibility: str) -> int:
    """The number of a rule (its place in ``VISIBILITIES``); ValueError for a name that is none of them."""
    if visibility not in VISIBILITIES:
        raise ValueError(f"visibility must be one of {VISIBILITIES}, got {visibility!r}")
    return VISIBILITIES.index(visibility)


def token_position(index: Index, slots: int, visibility: str) -> Index:
    """Cache position, and so position id, of token ``index`` (an int or an integer tensor of any shape)."""
    code = visibility_code(visibility)
    if code == PREFIX:
        return slots + index
    if code == ROLLING:
        return index + 1
    return 2 * index + 1


def slot_position(slot: Index, visibility: str, *, step: Index | None = None) -> Index:
    """Cache position of memory slot ``slot``; under ``rolling`` at step ``step`` (0 or later), then required."""
    code = visibility_code(visibility)
    if code == PREFIX:
        return slot
    if code == INTERLEAVED:
        return 2 * slot
    if step is None:
        raise ValueError("slot_position: step must be given under 'rolling', where slot 0 and slot 1 share position 0")
    return slot - 1 * (step > 0)


def visible_slots(index: int, slots: int, visibility: str, window: int | None = None) -> range:
    """The slots that token ``index`` sees, in order: always a run of consecutive ones."""
    code = visibility_code(visibility)
    if code == PREFIX:
        low, high = 0, slots - 1
    elif code == ROLLING:
        low, high = (0, 0) if index == 0 else (1, index)
    else:
        low, high = 0, index
    high = min(high, slots - 1)
    if window is not None:
        first = token_position(index, slots, visibility) - window + 1  # the first cache position inside the window
        if code == ROLLING:
            first += index > 0
        elif code == INTERLEAVED:
            first = (first + 1) // 2
        low = max(low, first)
    return range(low, max(low, high + 1))


def visible_tokens(index: int, slots: int, visibility: str, window: int | None = None) -> range:
    """The tokens that token ``index`` sees, in order: always a run that ends with itself."""
    code = visibility_code(visibility)
    low = max(0, index - 1) if code == ROLLING else 0
    if window is not None:
        reach = (window - 1) // 2 if code == INTERLEAVED else window - 1  # how many tokens back the window reaches
        low = max(low, index - reach)
    return range(low, index + 1)


def visibility_mask(
    tokens: int, slots: int, visibility: str, window: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Boolean [tokens, slots + tokens]: may token i (row) see slot j (column j) or token t (column slots + t)?

    ``window`` counts cache positions; None means no window. Every row has its own token visible, so none is empty. More
    rows may be asked for than a rule has slots for (a bound on the longest sentence); the op refuses such sentences.
    """
    i = torch.arange(tokens, device=device).unsqueeze(1)
    j = torch.arange(slots, device=device).unsqueeze(0)
    t = torch.arange(tokens, device=device).unsqueeze(0)
    code = visibility_code(visibility)
    if code == PREFIX:
        sees_slot, sees_token = (j >= 0).expand(tokens, slots), t <= i
    elif code == ROLLING:
        sees_slot = torch.where(i == 0, j == 0, (j >= 1) & (j <= i))
        sees_token = (t <= i) & (t >= i - 1)
    else:
        sees_slot, sees_token = j <= i, t <= i
    if window is not None:
        first = token_position(i, slots, visibility) - window + 1  # the first cache position inside the window
        sees_slot = sees_slot & (slot_position(j, visibility, step=i) >= first)
        # Rolling keeps token i - 1 at position i, one below token i at i + 1: the same distance as its own position id.
        sees_token = sees_token & (token_position(t, slots, visibility) >= first)
    return torch.cat([sees_slot, sees_token], dim=1)


def check_visibility(tokens: int, slots: int, visibility: str, window: int | None) -> None:
    """Raises ValueError for an unknown rule, a window below 1, or a sentence that outgrows the slots its rule needs."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if visibility_code(visibility) != PREFIX and tokens > slots:
        raise ValueError(
            f"visibility {visibility!r} needs one memory slot per token: the longest sentence has {tokens} tokens, "
            f"memory_k has {slots} slots"
        )
