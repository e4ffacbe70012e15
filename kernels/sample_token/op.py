"""sample_token: registration and the public function. The truth is reference.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend, philox
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference

LARGEST_VOCABULARY = 2**22  # beyond it the unit of the weights would show in the tails

# ---- primitives ------------------------------------------------------------------------------------------------------


def _fake(logits, seed, rows, steps, seen, greedy, temperature, top_k, top_p, min_p, penalty, logprob):
    batch = logits.shape[0]
    return (
        logits.new_empty(batch, dtype=torch.int64),
        logits.new_empty(batch if logprob else 0, dtype=torch.float32),
    )


def _triton(*args):
    from .triton import sample_token

    return sample_token(*args)


define(
    "sample_token(Tensor logits, Tensor seed, Tensor rows, Tensor steps, Tensor? seen, bool greedy, float temperature, "
    "int top_k, float top_p, float min_p, float penalty, bool logprob) -> (Tensor, Tensor)",
    fake=_fake,
    triton=_triton,
)
backend.register(
    "sample_token",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, ("sample_token",)),
    triton=backend.Support(backend.FLOATS, ("sample_token",)),
)

# ---- the public function ---------------------------------------------------------------------------------------------


def sample_token(
    logits: Tensor,
    *,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
    steps: Tensor | None = None,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    logprob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The next token of every row: the most probable (greedy), or drawn from what the filters keep.

    Order: repetition penalty, temperature, top-k, top-p over what top-k kept, min-p. Tokens of equal score are kept or
    dropped together, so that a filter never decides by token id.

    Args:
        logits: [B, V]; fp32, fp16, bf16 or fp64, any strides. V is 1 to 2^22. -inf forbids a token.
        greedy: take the largest (penalised) logit, of equal ones the lowest id; what belongs to a draw is not looked at.
        temperature: the scores are divided by it; above 0.
        top_k: keep the top_k largest scores (more when several equal the last); 0 keeps all.
        top_p: keep the fewest tokens, most probable first, whose probabilities reach top_p, in (0, 1] (Holtzman et al.
            2020, nucleus sampling). 1 keeps all.
        min_p: keep tokens at least min_p times as probable as the most probable, in [0, 1] (Nguyen et al. 2024).
        seed: None (drawn from torch's generator of the device), an int, or an int64 tensor [2] = (seed, offset).
        rows, steps: int64 [B] on the device: the draw of a row uses block ``rows[b]`` of the Philox stream
            (seed, offset + steps[b]) and nothing else, so that a sentence's text does not depend on its batch.
            Default: 0 .. B - 1, and 0.
        seen: bool or uint8 [B, V], the tokens that ``repetition_penalty`` applies to (Keskar et al. 2019, section 4.1):
            positive scores are divided by it, negative ones multiplied.
        repetition_penalty: above 0; needs ``seen`` unless it is 1.
        logprob: also return ln of the chosen token's probability under softmax(logits), nothing penalised or filtered.

    Returns:
        ids int64 [B]; with ``logprob`` also fp32 [B]. Not differentiable: where gradients are recorded, ``logprob`` of logits
        that require one is refused.

    A row whose largest score is not finite (NaN, +inf, all -inf) is not drawn from: its id is the greedy one, where a NaN
    counts as the largest, as in torch.argmax. Probabilities below 2^-52 V of the most probable token's count as 0.
    Backends agree to the last bit of an exponential. No host synchronisation, no sort of the vocabulary. Raises ValueError
    or TypeError naming the argument, BackendError when a forced backend cannot run.
    """
    _check(logits, rows, steps, seen)
    _check_options(greedy, temperature, top_k, top_p, min_p, repetition_penalty, seen)
    refuse_vmap("sample_token", logits, seen)
    if logprob:  # an id is a constant to autograd anyway
        refuse_gradients("sample_token", logits=logits)
    logits, device = logits.detach(), logits.device
    pair = philox.seed_tensor(0 if greedy else seed, device)
    rows = torch.arange(logits.shape[0], device=device) if rows is None else rows
    steps = torch.zeros_like(rows) if steps is None else steps
    if repetition_penalty == 1.0:
        seen = None
    elif seen is not None and seen.dtype == torch.bool:
        seen = seen.view(torch.uint8)
    temperature = min(max(float(temperature), 1e-30), 1e30)  # so that its reciprocal is a normal fp32 number
    choice = backend.choose("sample_token", logits)
    if choice == "reference":
        ids, logprobs = reference.sample_token(
            logits, pair, rows, steps, seen, greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            penalty=repetition_penalty, logprob=logprob,
        )  # fmt: skip
    else:
        ids, logprobs = primitives(choice, logits).sample_token(
            logits, pair, rows, steps, seen, greedy, temperature, top_k, float(top_p), float(min_p),
            float(repetition_penalty), logprob,
        )  # fmt: skip
    return (ids, logprobs) if logprob else ids


def _check(logits: Tensor, rows: Tensor | None, steps: Tensor | None, seen: Tensor | None) -> None:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= LARGEST_VOCABULARY:
        raise ValueError(f"logits must be [B, V] with 1 <= V <= {LARGEST_VOCABULARY}, got {list(logits.shape)}")
    if logits.dtype not in backend.FLOATS_AND_DOUBLE:
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    for name, index in (("rows", rows), ("steps", steps)):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {index.dtype}")
        if index.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{logits.shape[0]}] for logits {list(logits.shape)}, got {list(index.shape)}")
        if index.device != logits.device:
            raise ValueError(f"{name} is on {index.device} and logits on {logits.device}")
    if seen is None:
        return
    if seen.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"seen must be bool or uint8, got {seen.dtype}")
    if seen.shape != logits.shape:
        raise ValueError(f"seen is {list(seen.shape)} and logits {list(logits.shape)}: they must have one shape")
    if seen.device != logits.device:
        raise ValueError(f"seen is on {seen.device} and logits on {logits.device}")


def _check_options(
    greedy: bool, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: Tensor | None
) -> None:
    # not math.isfinite: a graph may hold the numbers as symbols
    if not 0.0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty={penalty} must be above 0 and finite")
    if penalty != 1.0 and seen is None:
        raise ValueError(f"repetition_penalty={penalty} needs seen, the tokens it applies to")
    if greedy:
        return
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be above 0 and finite; greedy=True takes the most probable token")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be an int, 0 (all tokens) or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} is not in (0, 1]")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p={min_p} is not in [0, 1]")
