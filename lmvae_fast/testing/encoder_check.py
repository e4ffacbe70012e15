"""One text encoder type as a tiny random model: padding, neighbours, the longest text, and the width of its output."""

from __future__ import annotations

from typing import Any

import torch

from lmvae_fast.errors import LMVAEError
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing.mapped_types import tiny_encoder_of
from lmvae_fast.testing.parts import tiny_tokenizer

TOLERANCE = 1e-5
_TEXTS = ("a cat is a kind of animal", "the sun", "an animal needs food to live")
_LONG = " ".join(["the sun is a star and water is a liquid"] * 8)  # past every limit of a tiny configuration


def check_type(model_type: str) -> dict[str, Any]:
    """What became of a type: ``status`` right, refused, wrong or unbuilt, ``reason``, ``width`` and ``longest``."""
    tokenizer = tiny_tokenizer()
    try:
        model = tiny_encoder_of(model_type, len(tokenizer))
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return {"status": "unbuilt", "reason": f"{type(error).__name__}: {text[-1].strip()[:200]}"}
    result: dict[str, Any] = {"class": type(model).__name__}
    try:
        encoder = Encoder(model, tokenizer)
    except LMVAEError as error:
        return {**result, "status": "refused", "reason": error.problem}
    result |= {"width": encoder.width, "longest": encoder.max_tokens}
    try:
        off = _faults(encoder)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        off = [f"{type(error).__name__} {str(error)[:150]}"]
    return {**result, "status": "wrong" if off else "right", "reason": "; ".join(off)}


@torch.no_grad()
def _faults(encoder: Encoder) -> list[str]:
    found = []
    alone = torch.cat([encoder(*encoder.tokenize([text])) for text in _TEXTS])
    together = encoder(*encoder.tokenize(list(_TEXTS)))
    if not (alone - together).norm() <= TOLERANCE * alone.norm():
        found.append(f"depends on what a text is padded with ({(alone - together).norm() / alone.norm():.1e})")
    ids, mask = encoder.tokenize([_LONG])
    if encoder.max_tokens is not None and ids.shape[1] != encoder.max_tokens:
        found.append(f"a long text is cut at {ids.shape[1]} tokens")
    if encoder(ids, mask).shape != (1, encoder.width):
        found.append("has another width for a long text")
    hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    if hidden.shape[-1] != encoder.width:
        found.append(f"gives {hidden.shape[-1]} numbers a token and says {encoder.width}")
    if not torch.isfinite(hidden).all():
        found.append("is not finite on a text as long as it may be")
    return found
