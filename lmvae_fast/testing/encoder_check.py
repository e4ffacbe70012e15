"""One text encoder type as a tiny random model: padding, neighbours, the longest text, and the width of its output."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lmvae_fast.models.encoder import Encoder

TOLERANCE = 1e-5
_TEXTS = ("a cat is a kind of animal", "the sun", "an animal needs food to live")
_LONG = " ".join(["the sun is a star and water is a liquid"] * 8)  # past the limit of most tiny configurations


def check_encoder(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What became of a text encoder: ``status`` right or wrong, ``reason``, ``width`` and ``longest``.

    Raises ConfigError for one that is refused.
    """
    encoder = Encoder(model, tokenizer)
    try:
        off = _faults(encoder)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        off = [f"{type(error).__name__} {str(error)[:150]}"]
    found = {"width": encoder.width, "longest": encoder.max_tokens}
    return {"status": "wrong" if off else "right", "reason": "; ".join(off), **found}


@torch.no_grad()
def _faults(encoder: Encoder) -> list[str]:
    found = []
    alone = torch.cat([encoder(*encoder.tokenize([text])) for text in _TEXTS])
    together = encoder(*encoder.tokenize(list(_TEXTS)))
    if not (alone - together).norm() <= TOLERANCE * alone.norm():
        found.append(f"depends on what a text is padded with ({(alone - together).norm() / alone.norm():.1e})")
    ids, mask = encoder.tokenize([" ".join([_LONG] * (1 + (encoder.max_tokens or 0) // 64))])
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
