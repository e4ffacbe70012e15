"""Tokenised sentences to packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.text.batch import Batch, pack
from lmvae_fast.text.tokenizer import SentenceTokenizer, TokenizedSentences

EncoderTokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


def make_batch(
    sentences: TokenizedSentences,
    rows: Sequence[int] | np.ndarray | None = None,
    pooled: Tensor | None = None,
    *,
    tokenizer: SentenceTokenizer,
    max_len: int,
    encoder_tokenize: EncoderTokenize,
    predict_padding: bool = False,
) -> Batch:
    """Pack some sentences.

    Args:
        sentences: of which the batch is made.
        rows: which of them; all by default.
        pooled: encoder features of *all* sentences ``[N, width]``, or None: the batch then holds the encoder's own input.
        tokenizer: of the decoder.
        max_len: the most tokens predicted for a sentence.
        encoder_tokenize: padded ids and mask of texts.
        predict_padding: as LangVAE 0.6 does: no end token, every sentence padded to the batch's longest, the padding
            predicted too, and the tokens that equal the padding not counted.
    """
    rows = range(len(sentences)) if rows is None else rows
    ids = [sentences.ids[row] for row in rows]
    if predict_padding:
        longest = max(map(len, ids), default=0)
        pad = tokenizer.eos_token_id
        labels = [sentence + [pad] * (longest - len(sentence)) for sentence in ids]
        inputs = with_start(labels, tokenizer)
        tokens = [sum(token != pad for token in sentence) for sentence in labels]
    else:
        inputs, labels = inputs_and_labels(ids, tokenizer, max_len)
        tokens = [len(sentence) for sentence in labels]
    index = torch.tensor(list(rows), dtype=torch.int64)
    encoder_ids = encoder_mask = None
    if pooled is None:
        encoder_ids, encoder_mask = encoder_tokenize([sentences.spelled[row] for row in rows])
    return Batch(
        **pack(inputs, labels),  # type: ignore[arg-type]
        tokens=torch.tensor(tokens, dtype=torch.int64),
        indices=torch.tensor([sentences.source_rows[row] for row in rows], dtype=torch.int64),
        pooled=None if pooled is None else pooled[index],
        encoder_ids=encoder_ids,
        encoder_mask=encoder_mask,
        annotations=None if sentences.annotations is None else sentences.annotations[index],
        texts=[sentences.texts[row] for row in rows],
    )


def batch_to_score(ids: Sequence[list[int]], tokenizer: SentenceTokenizer, max_len: int) -> Batch:
    """Sentences to be predicted, and nothing for an encoder."""
    inputs, labels = inputs_and_labels(ids, tokenizer, max_len)
    lengths = torch.tensor([len(sentence) for sentence in labels])
    return Batch(**pack(inputs, labels), tokens=lengths, indices=torch.arange(len(labels)))  # type: ignore[arg-type]


def inputs_and_labels(
    ids: Sequence[list[int]], tokenizer: SentenceTokenizer, max_len: int
) -> tuple[list[list[int]], list[list[int]]]:
    """What the decoder reads and what it predicts: each sentence with its end token, as far as ``max_len`` reaches."""
    labels = [[*sentence, tokenizer.eos_token_id][:max_len] for sentence in ids]
    return with_start(labels, tokenizer), labels


def with_start(labels: Sequence[list[int]], tokenizer: SentenceTokenizer) -> list[list[int]]:
    """The inputs that predict ``labels``: the start token, and all labels but the last."""
    return [[tokenizer.bos_token_id, *sentence[:-1]] for sentence in labels]
