"""What a model reads, by its configuration: sentences, or prompts with responses; tokenised, and packed into batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lmvae_fast.config import LMVAEConfig, PlainDecoderConfig
from lmvae_fast.errors import DataError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.layer_encoder import LayerEncoder
from lmvae_fast.text import checks, collate, prompts, tokenizer
from lmvae_fast.text.batch import Batch
from lmvae_fast.text.tokenizer import TokenizedSentences

AnyConfig = LMVAEConfig | PlainDecoderConfig


def tokenize(
    examples: Iterable[Any],
    config: AnyConfig,
    decoder: Decoder,
    encoder: Encoder | LayerEncoder | None = None,
    *,
    on_long: str,
    on_empty: str,
) -> TokenizedSentences:
    """Sentences (:func:`~lmvae_fast.text.tokenizer.tokenize`), or prompts with responses
    (:func:`~lmvae_fast.text.prompts.tokenize_prompts`). Raises DataError for what the other kind of model takes."""
    if isinstance(examples, str):
        raise DataError("sentences must come as a list", value=repr(examples[:40]), remedy="wrap it: [text]")
    checks.refuse_table(examples)
    options: dict[str, Any] = {
        "max_len": config.max_len, "vocab_size": decoder.vocab_size, "on_long": on_long, "on_empty": on_empty
    }  # fmt: skip
    if config.prompted:
        return prompts.tokenize_prompts(
            examples, decoder.tokenizer, max_prompt_len=most_of_prompt(config, decoder), group_size=config.group_size,
            released=config.encoder_padding == "released",
            aggregated=getattr(config, "kl_mode", None) == "density_gap", **options,
        )  # fmt: skip
    examples = list(examples)
    if prompts.are_prompts(examples):
        raise DataError(
            "this model takes sentences, not prompts with responses", value=type(examples[0]).__name__,
            remedy="use system='cvae', or give the responses alone",
        )  # fmt: skip
    reader = encoder if isinstance(encoder, Encoder) else None
    return tokenizer.tokenize(examples, decoder.tokenizer, encoder=reader, labels=config.annotations, **options)


def most_of_prompt(config: AnyConfig, decoder: Decoder) -> int | None:
    """The most tokens that a prompt keeps: what the configuration says, or what slots, queries and the longest response leave
    of the decoder's positions; None where nothing limits it."""
    if config.max_prompt_len is not None:
        return config.max_prompt_len
    # An encoder of the decoder's layers reads an end token and its queries behind the response, but no slots before it
    before = max(int(config.slots or 0), config.queries + 1) if isinstance(config, LMVAEConfig) else 0
    most = decoder.most_tokens(before)
    return None if most is None else max(1, most - config.max_len)


def make_batch(
    sentences: TokenizedSentences,
    rows: Sequence[int] | np.ndarray | None,
    pooled: Tensor | None,
    config: AnyConfig,
    encoder: Encoder | LayerEncoder | None,
    decoder: Decoder,
) -> Batch:
    """Some of the sentences, packed; ``pooled``: features of all of them, or None for the encoder's own input."""
    if isinstance(sentences, prompts.TokenizedPrompts):
        released = config.encoder_padding == "released"
        return prompts.make_prompt_batch(
            sentences, rows, tokenizer=decoder.tokenizer, max_len=config.max_len, released=released
        )
    if not isinstance(encoder, Encoder):
        raise DataError(
            "this model takes prompts with responses, not sentences", value=type(sentences).__name__,
            remedy="tokenise them with model.tokenize",
        )  # fmt: skip
    return collate.make_batch(
        sentences,
        rows,
        pooled,
        tokenizer=decoder.tokenizer,
        max_len=config.max_len,
        encoder_tokenize=encoder.tokenize,
        predict_padding=config.objective == "langvae-0.6",
    )


def batch_to_score(sentences: TokenizedSentences, rows: Sequence[int], config: AnyConfig, decoder: Decoder) -> Batch:
    """Some of the sentences, packed to be predicted, end token included as far as there is room, without labels."""
    if isinstance(sentences, prompts.TokenizedPrompts):
        return prompts.make_prompt_batch(sentences, rows, tokenizer=decoder.tokenizer, max_len=config.max_len)
    return collate.batch_to_score([sentences.ids[row] for row in rows], decoder.tokenizer, config.max_len)


def beginnings(texts: Sequence[str], config: AnyConfig, decoder: Decoder) -> list[tuple[int, ...]]:
    """What the decoder reads of each prompt before it writes, never nothing: a start token and the prompt; of a model of
    prompts, the prompt as the tokenizer writes it by itself, cut at the left to its limit.

    Raises DataError for a prompt that is no text.
    """
    for row, text in enumerate(texts):
        checks.check_text(text, f"prompt {row}")
    if config.prompted:
        return [tuple(ids) for ids in prompts.prompt_ids(texts, decoder.tokenizer, most_of_prompt(config, decoder))]
    return [(decoder.tokenizer.bos_token_id, *ids) for ids in decoder.tokenizer.encode(texts)]
