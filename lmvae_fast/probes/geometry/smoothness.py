"""Interpolation smoothness: how direct the way of decoded sentences between two ends is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from lmvae_fast.errors import DataError
from lmvae_fast.probes.geometry.transport import word_movers_of_bags
from lmvae_fast.probes.geometry.word_bags import KnownWords
from lmvae_fast.probes.results import Score


def interpolation_smoothness(
    sentences: Sequence[str], vectors: Any, *, unit: bool = False, stop_words: Collection[str] = ()
) -> Score:
    """IS = WMD(first, last) / sum of WMD of neighbours: 1 for the straight way, about 1/T for T unrelated steps. 0 to 1.

    Args:
        sentences: the decoded points of an interpolation in order, both ends included, at least two.
        vectors, unit: word vectors, see :func:`word_movers_distance`, or a :class:`KnownWords`, which keeps what it has looked
            up for the next path; their choice and T are part of the figure.
        stop_words: words to leave out.

    Returns:
        ``details``: ``end_to_end`` and ``steps``, the distances. Sentences that are all equal have smoothness 1 (nothing
        moves, nothing strays). A point between without any known word is infinitely far from both neighbours: smoothness 0,
        and the point is named in ``left_out``.

    Raises:
        DataError: fewer than two sentences, or an end without any known word.

    Source: Zhang et al. 2024 (LangVAE and LangSpace, arXiv 2505.00004), interpolation smoothness.
    """
    known = vectors if isinstance(vectors, KnownWords) else KnownWords(vectors, unit=unit)
    if isinstance(sentences, str) or len(sentences) < 2:
        raise DataError(
            "an interpolation has two ends", value=f"{len(sentences)} sentences", limit="a list of at least 2"
        )
    bags = [known.bag(text, stop_words) for text in sentences]
    empty = [place for place, bag in enumerate(bags) if not bag]
    ends = [place for place in (0, len(bags) - 1) if place in empty]
    if ends:
        raise DataError(
            "an end of the interpolation has no word with a vector", value=repr(sentences[ends[0]]),
            remedy="use other word vectors, or fewer stop words",
        )  # fmt: skip
    steps = [word_movers_of_bags(first, second, known) for first, second in pairwise(bags)]
    end_to_end, way = word_movers_of_bags(bags[0], bags[-1], known), sum(steps)
    # Rounding may carry a straight way a little above 1.
    value = 1.0 if way == 0.0 else min(end_to_end / way, 1.0)
    return Score(
        value,
        left_out={"points": dict.fromkeys(empty, "no word with a vector")} if empty else {},
        choices={"vectors": known.name, "unit": known.unit, "stop_words": len(set(stop_words)), "T": len(steps),
                 "words": "lower case, split at white space", "unknown_words": "tried without punctuation, then dropped"},
        details={"end_to_end": end_to_end, "steps": steps},
    )  # fmt: skip
