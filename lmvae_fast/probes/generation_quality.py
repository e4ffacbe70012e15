"""All figures of generated texts that their inputs allow, by name: the one home of quality, diversity and distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text import distributions, diversity, embedding_match, overlap


def generation_quality(
    generated: Sequence[str],
    references: Sequence[str] | None = None,
    *,
    paired: bool = False,
    embeddings: Any = None,
    reference_embeddings: Any = None,
    encoder: Any = None,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Score]:
    """Diversity of texts, and how near they are to references where there are any.

    Args:
        generated: at least two texts.
        references: texts to compare with.
        paired: ``references[i]`` is the right text in the place of ``generated[i]`` (a reconstruction, a gloss): adds BLEU,
            chrF, TER, and BERTScore and MoverScore where an encoder is given.
        embeddings, reference_embeddings: sentence embeddings ``[N, D]``, ``[M, D]`` of both sides: adds the Frechet distance
            and MAUVE.
        encoder: folder of a masked language model, for BERTScore (its last layer) and MoverScore.
        seeds: of MAUVE's k-means.

    Returns:
        Scores by name: ``self_bleu``, ``distinct_1`` to ``distinct_4``; ``bleu``, ``chrf``, ``chrf++``, ``ter``;
        ``bert_score``, ``mover_score``; ``frechet_distance``, ``mauve``. An order of distinct-n that no text reaches is
        absent.

    Raises:
        DataError: too few texts, a paired comparison of unequal numbers, or one side's embeddings without the other's.
    """
    texts = overlap.texts(generated, name="generated", least=2)
    found: dict[str, Score] = {"self_bleu": diversity.self_bleu(texts)}
    longest = max(len(text.split()) for text in texts)
    found |= {f"distinct_{n}": diversity.distinct_n(texts, n) for n in range(1, 5) if n <= longest}
    if paired:
        if references is None:
            raise DataError("a paired comparison needs references", value="references=None")
        found |= overlap.reference_overlap(texts, references)
        if encoder is not None:
            layers = (
                require("transformers", "BERTScore")
                .AutoConfig.from_pretrained(str(encoder), trust_remote_code=False)
                .num_hidden_layers
            )
            found["bert_score"] = embedding_match.bert_score(texts, references, encoder, layer=layers)
            found["mover_score"] = embedding_match.mover_score(texts, references, encoder)
    if (embeddings is None) != (reference_embeddings is None):
        raise DataError("both sides need embeddings", value="one side's only", remedy="give both, or none")
    if embeddings is not None:
        for name, side, count in (
            ("embeddings", embeddings, len(texts)),
            ("reference_embeddings", reference_embeddings, None if references is None else len(references)),
        ):
            if count is not None and len(side) != count:
                raise DataError(f"{name} must have a row for each text", value=len(side), limit=count)
        found["frechet_distance"] = distributions.frechet_distance(embeddings, reference_embeddings)
        found["mauve"] = distributions.mauve(np.asarray(embeddings), np.asarray(reference_embeddings), seeds=seeds)
    return found
