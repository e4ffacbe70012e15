"""How alike generated texts are among themselves: self-BLEU and distinct-n.

Self-BLEU is counted here and not by nltk: each sentence against all others costs a library N^2 sentences, and N where
every n-gram keeps its two largest counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text.overlap import Tokens, ngrams, smoothed_corpus_bleu, tokens_13a

#: How self-BLEU is counted by the two public implementations.
SELF_BLEU_FORMS = ("texygen", "nmt")

#: What distinct-n divides by, or averages over.
DISTINCT_FORMS = ("ngrams", "tokens", "sentences")

_EPSILON = 0.1  # of nltk's smoothing method 1


def self_bleu(sentences: Sequence[str | Sequence[str]], n: int = 4, *, form: str = "texygen") -> Score:
    """How alike texts are: BLEU of each against all others. 0 (nothing shared) to 1 (all equal); lower is more diverse.

    Args:
        sentences: at least two, or lists of tokens.
        n: highest order of n-grams, equally weighted.
        form: ``"texygen"``: the mean over sentences of sentence BLEU with nltk's smoothing method 1 (an order without a
            match counts 0.1 matches), tokens lower-cased and split at white space. ``"nmt"``: corpus BLEU with one added
            to every count, tokens of sacrebleu's 13a, case kept, the length of the shortest other sentence as reference
            length; within one prompt's responses this is the figure of CVAE's repository.

    Returns:
        ``details["sentences"]``: each sentence's own, in ``"texygen"`` form.

    Source: Zhu et al. 2018 (Texygen, arXiv 1802.01886).
    """
    checks.whole("n", n, 1)
    checks.one_of("form", form, SELF_BLEU_FORMS)
    if isinstance(sentences, str) or len(sentences) < 2:
        raise DataError("self-BLEU compares sentences", value=len(sentences), limit=">= 2")
    if form == "texygen":
        tokens = [text.lower().split() if isinstance(text, str) else list(text) for text in sentences]
        each = _each_against_others(tokens, n)
        return Score(float(np.mean(each)), choices={"form": form, "n": n, "smoothing": "nltk method 1"},
                     details={"sentences": each})  # fmt: skip
    tokens = [tokens_13a(text) for text in sentences]
    return Score(
        _corpus_against_others(tokens, n), choices={"form": form, "n": n, "smoothing": "add one", "tokens": "13a"}
    )


def distinct_n(sentences: Sequence[str | Sequence[str]], n: int = 1, *, form: str = "ngrams") -> Score:
    """Share of n-grams that are different. 0 to 1; higher is more diverse, and fewer or shorter texts score higher.

    Args:
        sentences: at least one, or lists of tokens; split at white space, case kept.
        n: order.
        form: ``"ngrams"``: different n-grams of the whole corpus / all its n-grams. ``"tokens"``: / all its tokens (Li et
            al. 2016, arXiv 1510.03055). ``"sentences"``: the mean over sentences of their own share; sentences shorter
            than n are named and left out.
    """
    checks.whole("n", n, 1)
    checks.one_of("form", form, DISTINCT_FORMS)
    if isinstance(sentences, str) or not len(sentences):
        raise DataError("distinct-n needs a list of sentences", value=type(sentences).__name__, limit="at least one")
    tokens = [text.split() if isinstance(text, str) else list(text) for text in sentences]
    grams = [ngrams(row, n) for row in tokens]
    total, unique = sum(sum(row.values()) for row in grams), len(set().union(*grams))
    if total == 0:
        raise DataError(f"no sentence has {n} tokens", value=f"at most {max(map(len, tokens))}", limit=f">= {n}")
    details = {"unique": unique, "ngrams": total, "tokens": sum(map(len, tokens))}
    choices = {"form": form, "n": n, "sentences": len(tokens)}
    if form == "sentences":
        short = {place: f"shorter than {n} tokens" for place, row in enumerate(grams) if not row}
        value = float(np.mean([len(row) / sum(row.values()) for row in grams if row]))
        return Score(value, left_out={"sentences": short} if short else {}, choices=choices, details=details)
    return Score(unique / (total if form == "ngrams" else details["tokens"]), choices=choices, details=details)


class _TwoLargest:
    """For every n-gram the largest and the second largest count in a sentence: "the most in any other sentence"."""

    def __init__(self, grams: list[Counter[tuple[str, ...]]]):
        self.first: dict[tuple[str, ...], int] = {}
        self.second: dict[tuple[str, ...], int] = {}
        for row in grams:
            for gram, count in row.items():
                first = self.first.get(gram, 0)
                if count > first:
                    self.first[gram], self.second[gram] = count, first
                elif count > self.second.get(gram, 0):
                    self.second[gram] = count

    def clipped(self, row: Counter[tuple[str, ...]]) -> int:
        """Matches of a sentence against all others, each n-gram counted at most as often as in the one that has most."""
        total = 0
        for gram, count in row.items():
            first = self.first[gram]
            # Where this sentence holds the largest count, another may hold the same: then second equals first.
            total += min(count, self.second.get(gram, 0) if count == first else first)
        return total


def _each_against_others(tokens: list[Tokens], n: int) -> list[float]:
    orders = [[ngrams(row, order) for row in tokens] for order in range(1, n + 1)]
    largest = [_TwoLargest(grams) for grams in orders]
    lengths = np.array([len(row) for row in tokens])
    distinct, counts = np.unique(lengths, return_counts=True)
    found = []
    for place, row in enumerate(tokens):
        matches = [table.clipped(grams[place]) for table, grams in zip(largest, orders, strict=True)]
        if matches[0] == 0:
            found.append(0.0)
            continue
        totals = [max(1, sum(grams[place].values())) for grams in orders]
        logs = [math.log((match or _EPSILON) / total) / n for match, total in zip(matches, totals, strict=True)]
        # The other length closest to this one, the shorter of two equally close.
        others = distinct[(counts > 1) | (distinct != len(row))]
        closest = int(min(others, key=lambda length: (abs(length - len(row)), length)))
        penalty = 1.0 if len(row) > closest else math.exp(1.0 - closest / len(row))
        found.append(penalty * math.exp(math.fsum(logs)))
    return found


def _corpus_against_others(tokens: list[Tokens], n: int) -> float:
    lengths = sorted(len(row) for row in tokens)
    shortest, next_shortest = lengths[0], lengths[1]
    reference = sum(next_shortest if len(row) == shortest else shortest for row in tokens)
    matches, possible = [], []
    for order in range(1, n + 1):
        grams = [ngrams(row, order) for row in tokens]
        largest = _TwoLargest(grams)
        matches.append(sum(map(largest.clipped, grams)))
        possible.append(sum(row.total() for row in grams))
    return smoothed_corpus_bleu(matches, possible, sum(lengths), reference)
