"""Definition modelling: generated glosses against the dictionary's, and words found from their definitions.

Source: the CODWOE shared task, Mickus et al. 2022 (arXiv 2205.13858): sense-BLEU, lemma-BLEU, MoverScore of each pair, and
the three figures of the reverse dictionary.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score

#: Which side BLEU takes for the reference: the gloss, or, as CODWOE's scorer does, the prediction.
DIRECTIONS = ("standard", "codwoe")

Gloss = str | Sequence[str]


def sense_bleu(predictions: Sequence[Gloss], glosses: Sequence[Gloss], direction: str = "standard") -> Score:
    """Mean sentence BLEU-4 (nltk, smoothing method 4) of each prediction with its own gloss. 0 to 1.

    Args:
        predictions, glosses: equally many texts (lower-cased, split at white space) or lists of tokens.
        direction: ``"standard"`` takes the gloss for the reference; ``"codwoe"`` the prediction, as CODWOE's scorer does:
            compare only figures of one direction.

    Returns:
        ``details["items"]``: BLEU of each pair.
    """
    ours, theirs = _tokens(predictions, "predictions"), _tokens(glosses, "glosses")
    _same_length(predictions=ours, glosses=theirs)
    bleu = _bleu(direction)
    items = [bleu(prediction, gloss) for prediction, gloss in zip(ours, theirs, strict=True)]
    return Score(float(np.mean(items)), choices=_choices(direction), details={"items": items})


def lemma_bleu(
    predictions: Sequence[Gloss], glosses: Sequence[Gloss], lemmas: Sequence[Hashable], direction: str = "standard"
) -> Score:
    """As :func:`sense_bleu`, but with the best of all glosses of the same lemma: a right definition of another sense counts.

    Args:
        predictions, glosses: as there.
        lemmas: what items are grouped by: (word, part of speech) in CODWOE.
    """
    ours, theirs = _tokens(predictions, "predictions"), _tokens(glosses, "glosses")
    _same_length(predictions=ours, glosses=theirs, lemmas=lemmas)
    bleu = _bleu(direction)
    senses: dict[Hashable, list[list[str]]] = {}
    for lemma, gloss in zip(lemmas, theirs, strict=True):
        senses.setdefault(lemma, []).append(gloss)
    items = [
        max(bleu(prediction, gloss) for gloss in senses[lemma]) for prediction, lemma in zip(ours, lemmas, strict=True)
    ]
    return Score(float(np.mean(items)), choices=_choices(direction), details={"items": items})


def reverse_dictionary(predictions: Any, targets: Any) -> dict[str, Score]:
    """Vectors of words guessed from definitions: ``mse``, ``cosine`` (to the right one) and ``rank``.

    ``rank`` is the mean share of all targets that are at least as close (by cosine) to the prediction as the right one:
    1/N at best, about 0.5 for guesses.

    Args:
        predictions, targets: ``[N, D]``, row by row of the same words.
    """
    guess, truth = checks.latents(predictions, name="predictions"), checks.latents(targets, name="targets")
    if guess.shape != truth.shape:
        raise DataError(
            "predictions and targets must have one shape", value=f"{list(guess.shape)}, {list(truth.shape)}"
        )
    near = _unit(guess) @ _unit(truth).T
    own = np.diag(near)
    # The same product for all: the right one must be found equal to itself.
    shares = (near >= own[:, None]).mean(axis=1)
    error = ((guess - truth) ** 2).mean(axis=1)
    choices = {"words": len(guess), "dimensions": guess.shape[1]}
    return {
        "mse": Score(float(error.mean()), choices=choices, details={"items": error}),
        "cosine": Score(float(own.mean()), choices=choices, details={"items": own}),
        "rank": Score(float(shares.mean()), choices=choices, details={"items": shares}),
    }


def _bleu(direction: str) -> Any:
    checks.one_of("direction", direction, DIRECTIONS)
    library = require("nltk.translate.bleu_score", "BLEU of glosses", "metrics")
    smoothing = library.SmoothingFunction().method4

    def score(prediction: list[str], gloss: list[str]) -> float:
        reference, hypothesis = (gloss, prediction) if direction == "standard" else (prediction, gloss)
        if not hypothesis or not reference:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nltk warns of every pair without a common n-gram
            return float(library.sentence_bleu([reference], hypothesis, smoothing_function=smoothing))

    return score


def _choices(direction: str) -> dict[str, Any]:
    side = "gloss" if direction == "standard" else "prediction"
    return {"direction": direction, "reference": side, "n": 4, "smoothing": "nltk method 4"}


def _tokens(given: Sequence[Gloss], name: str) -> list[list[str]]:
    if isinstance(given, str) or not len(given):
        raise DataError(f"{name} must be a list of texts", value=type(given).__name__, limit="at least one")
    return [text.lower().split() if isinstance(text, str) else list(text) for text in given]


def _same_length(**columns: Sequence[Any]) -> None:
    if len({len(column) for column in columns.values()}) != 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise DataError("items must be equally many", value=sizes)


def _unit(matrix: Array) -> Array:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(lengths > 0.0, lengths, 1.0)
