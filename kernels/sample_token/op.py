"""sample_token: registration and the public function. The truth is reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend, philox
from ..registration import define, primitives, refuse_gradients, refuse_vmap
from . import reference
from .checks import check_options, check_tensors

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
    check_tensors(logits, rows, steps, seen)
    check_options(greedy, temperature, top_k, top_p, min_p, repetition_penalty, seen)
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
    # Its reciprocal must be a normal fp32 number. Branches, where min and max would make a constant of a graph's symbol.
    if temperature < 1e-30:
        temperature = 1e-30
    elif temperature > 1e30:
        temperature = 1e30
    choice = backend.choose("sample_token", logits)
    if choice == "reference":
        ids, logprobs = reference.sample_token(
            logits, pair, rows, steps, seen, greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            penalty=repetition_penalty, logprob=logprob,
        )  # fmt: skip
    else:
        ids, logprobs = primitives(choice, logits).sample_token(
            logits, pair, rows, steps, seen, greedy, float(temperature), top_k, float(top_p), float(min_p),
            float(repetition_penalty), logprob,
        )  # fmt: skip
    return (ids, logprobs) if logprob else ids
