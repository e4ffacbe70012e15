"""Text measures of the responses to each prompt, averaged over prompts: the text columns of CVAE with G-Skip's table.

Source: IEEE TAI 7(2), 2026, as its public code (zhangjf-nlp/LLM-based-CVAE) computes them within a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text import distributions, diversity, overlap

#: What an empty response becomes before it is measured, as in the public code.
EMPTY = "."


def response_quality(
    generated: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]] | None = None,
    *,
    paired: bool = False,
    embed: Callable[[list[str]], Any] | None = None,
    clusters: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Score]:
    """Diversity of the responses to a prompt, and how near they are to its references where there are any.

    Args:
        generated: the responses to each prompt, at least two of each; empty ones count as ".".
        references: those of each prompt, in the same order.
        paired: ``references[p][i]`` is the right response in the place of ``generated[p][i]`` (reconstructions from
            posteriors): ROUGE is then taken pair by pair, and otherwise once per prompt, of all responses as one text of as
            many lines.
        embed: texts -> embeddings ``[N, D]``: adds MAUVE. The published figures take GPT-2 large's.
        clusters, seeds: of MAUVE's k-means.

    Returns:
        Means over prompts by name: ``self_bleu`` (corpus BLEU-4 of each response against the others, add-one), ``distinct_4``;
        with references ``rouge_lsum``, and with ``embed`` ``mauve``. ``details["prompts"]`` has each prompt's.

    Raises:
        DataError: no prompt, a prompt with one response, or generated and references that do not fit.
        MissingPackageError: rouge-score is absent (extra ``metrics``).
    """
    ours = _texts(generated, "generated", 2)
    theirs = None if references is None else _texts(references, "references", 1)
    if theirs is not None and (
        len(theirs) != len(ours) or (paired and any(len(a) != len(b) for a, b in zip(ours, theirs, strict=False)))
    ):
        raise DataError(
            "generated and references do not fit", value=f"{len(ours)} and {len(theirs)} prompts",
            limit="the same prompts" + (", with as many responses" if paired else ""),
        )  # fmt: skip
    found = {"self_bleu": [float(diversity.self_bleu(texts, form="nmt")) for texts in ours]}
    found["distinct_4"] = [
        float(diversity.distinct_n(texts, 4)) for texts in ours if any(len(text.split()) >= 4 for text in texts)
    ]
    if theirs is not None:
        joined = zip(ours, theirs, strict=True)
        found["rouge_lsum"] = [
            float(overlap.rouge_lsum(a, b) if paired else overlap.rouge_lsum(["\n".join(a)], ["\n".join(b)]))
            for a, b in joined
        ]
        if embed is not None:
            found["mauve"] = [
                float(distributions.mauve(np.asarray(embed(a)), np.asarray(embed(b)), clusters=clusters, seeds=seeds))
                for a, b in zip(ours, theirs, strict=True)
            ]
    choices: dict[str, Any] = {"prompts": len(ours), "paired": paired, "clusters": clusters if embed else None}
    return {
        name: Score(float(np.mean(values)), choices=choices, details={"prompts": values})
        for name, values in found.items()
        if values
    }


def _texts(value: Sequence[Sequence[str]], name: str, least: int) -> list[list[str]]:
    if isinstance(value, str) or not len(value):
        raise DataError(f"{name} must be a list of responses for each prompt", value=type(value).__name__)
    return [[text.strip() or EMPTY for text in overlap.texts(row, name=name, least=least)] for row in value]
