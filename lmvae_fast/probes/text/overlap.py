"""Texts against references by their n-grams: BLEU in its public forms, chrF, TER."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Score

Tokens = list[str]


def reference_overlap(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """Corpus BLEU-4, chrF, chrF++ and TER of sacrebleu, one reference for each text; all on its scale of 0 to 100.

    Args:
        hypotheses, references: equally many texts, at least one.

    Returns:
        Scores by the names ``bleu``, ``chrf``, ``chrf++``, ``ter`` (a rate of errors: lower is better, may exceed 100);
        ``bleu`` has ``details["sentences"]``, smoothed sentence BLEU, and the n-gram precisions.
    """
    texts(hypotheses, name="hypotheses")
    texts(references, name="references")
    if len(hypotheses) != len(references):
        raise DataError(
            "hypotheses and references must be equally many", value=f"{len(hypotheses)} and {len(references)}"
        )
    sacrebleu = require("sacrebleu", "BLEU, chrF and TER", "metrics")
    ours, theirs = list(hypotheses), [list(references)]
    bleu = sacrebleu.corpus_bleu(ours, theirs)
    sentences = [sacrebleu.sentence_bleu(text, [other]).score for text, other in zip(ours, references, strict=True)]
    details = {"sentences": sentences, "precisions": bleu.precisions, "brevity_penalty": bleu.bp}
    choices: dict[str, Any] = {"library": f"sacrebleu {sacrebleu.__version__}", "scale": "0 to 100"}
    with_words = sacrebleu.corpus_chrf(ours, theirs, word_order=2).score
    return {
        "bleu": Score(bleu.score, choices={**choices, "tokens": "13a", "smoothing": "exp", "n": 4}, details=details),
        "chrf": Score(sacrebleu.corpus_chrf(ours, theirs).score, choices={**choices, "characters": 6, "words": 0}),
        "chrf++": Score(with_words, choices={**choices, "characters": 6, "words": 2}),
        "ter": Score(sacrebleu.corpus_ter(ours, theirs).score, choices=choices),
    }  # fmt: skip


def nltk_bleu(hypotheses: Sequence[str], references: Sequence[str], *, method: int = 1, n: int = 4) -> Score:
    """nltk's BLEU, one reference for each text, tokens lower-cased and split at white space. 0 to 1.

    Args:
        hypotheses, references: equally many texts.
        method: nltk's smoothing method of sentences, 0 (none) to 7.
        n: highest order of n-grams, equally weighted.

    Returns:
        The mean of sentence BLEU; ``details["sentences"]`` and ``details["corpus"]``, corpus BLEU without smoothing.
    """
    checks.whole("method", method, 0, 7)
    checks.whole("n", n, 1)
    equally_many(hypotheses, references)
    library = require("nltk.translate.bleu_score", "nltk's BLEU", "metrics")
    ours, theirs = ([text.lower().split() for text in side] for side in (hypotheses, references))
    smoothing, weights = getattr(library.SmoothingFunction(), f"method{method}"), (1.0 / n,) * n
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every sentence without a common n-gram
        sentences = [
            float(library.sentence_bleu([other], row, weights, smoothing))
            for row, other in zip(ours, theirs, strict=True)
        ]
        corpus = float(library.corpus_bleu([[other] for other in theirs], ours, weights))
    details = {"sentences": sentences, "corpus": corpus}
    return Score(float(np.mean(sentences)), choices={"method": method, "n": n, "tokens": "lower case"}, details=details)


def rouge_lsum(hypotheses: Sequence[str], references: Sequence[str], *, stemmed: bool = False) -> Score:
    """ROUGE-Lsum F1: the union of longest common subsequences over the lines of two texts. 0 to 1.

    Args:
        hypotheses, references: equally many texts; a text's sentences are its lines.
        stemmed: compare the stems of words (Porter's); Hugging Face's ``evaluate`` does not by default.

    Returns:
        The mean over pairs; ``details["pairs"]``.

    Source: Lin 2004, by the package rouge-score.
    """
    equally_many(hypotheses, references)
    library = require("rouge_score.rouge_scorer", "ROUGE", "metrics")
    scorer = library.RougeScorer(["rougeLsum"], use_stemmer=stemmed)
    pairs = [
        float(scorer.score(other, text)["rougeLsum"].fmeasure)
        for text, other in zip(hypotheses, references, strict=True)
    ]
    return Score(float(np.mean(pairs)), choices={"stemmed": stemmed, "lines": "sentences"}, details={"pairs": pairs})


def nmt_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> Score:
    """Corpus BLEU of the script of TensorFlow NMT that Hugging Face's ``evaluate`` and the CVAE repository use. 0 to 1.

    One is added to the matches and to the possible matches of every order; the reference length of a text is that of its
    shortest reference; tokens are sacrebleu's 13a, case kept.

    Args:
        hypotheses: texts.
        references: for each text one or more.
        n: highest order of n-grams.
    """
    checks.whole("n", n, 1)
    texts(hypotheses, name="hypotheses")
    if len(hypotheses) != len(references) or any(isinstance(row, str) or not len(row) for row in references):
        raise DataError(
            "each text needs a list of references", value=f"{len(hypotheses)} texts, {len(references)} lists"
        )
    ours = [tokens_13a(text) for text in hypotheses]
    theirs = [[tokens_13a(text) for text in row] for row in references]
    matches, possible = [], []
    for order in range(1, n + 1):
        counts = [ngrams(row, order) for row in ours]
        most = [reduce(or_, (ngrams(other, order) for other in row)) for row in theirs]
        matches.append(sum((count & limit).total() for count, limit in zip(counts, most, strict=True)))
        possible.append(sum(count.total() for count in counts))
    lengths = sum(map(len, ours)), sum(min(map(len, row)) for row in theirs)
    return Score(
        smoothed_corpus_bleu(matches, possible, *lengths), choices={"n": n, "smoothing": "add one", "tokens": "13a"}
    )


def smoothed_corpus_bleu(matches: Sequence[int], possible: Sequence[int], length: int, reference_length: int) -> float:
    """BLEU of counts by order, one added to each; brevity penalty exp(1 - r/l) where the texts are not longer."""
    logs = [math.log((found + 1.0) / (all_ + 1.0)) for found, all_ in zip(matches, possible, strict=True)]
    if length == 0:
        return 0.0
    penalty = 1.0 if length > reference_length else math.exp(1.0 - reference_length / length)
    return penalty * math.exp(sum(logs) / len(logs))


def tokens_13a(text: str | Sequence[str]) -> Tokens:
    """sacrebleu's default tokens of a text; a list of tokens as it is."""
    if not isinstance(text, str):
        return list(text)
    return require("sacrebleu.tokenizers.tokenizer_13a", "BLEU", "metrics").Tokenizer13a()(text).split()


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs."""
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def texts(value: Any, *, name: str = "texts", least: int = 1) -> list[str]:
    """A list of strings; raises DataError for a bare string, another type or too few."""
    if isinstance(value, str) or not all(isinstance(text, str) for text in value) or len(value) < least:
        raise DataError(f"{name} must be a list of strings", value=type(value).__name__, limit=f"at least {least}")
    return list(value)


def equally_many(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise DataError unless both are lists of strings of one length, not empty."""
    texts(hypotheses, name="hypotheses")
    texts(references, name="references")
    if len(hypotheses) != len(references):
        raise DataError(
            "hypotheses and references must be equally many", value=f"{len(hypotheses)} and {len(references)}"
        )
