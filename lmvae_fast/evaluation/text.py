"""How close decoded sentences come to their originals."""

from __future__ import annotations

from collections.abc import Sequence


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 of sacrebleu (13a tokens, exponential smoothing, case kept), on a scale of 0 to 1."""
    _check(hypotheses, references)
    import sacrebleu  # a second of import time that only this figure needs

    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score / 100.0


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of sentences that agree word for word."""
    _check(hypotheses, references)
    equal = sum(ours.split() == theirs.split() for ours, theirs in zip(hypotheses, references, strict=True))
    return equal / len(references)


def token_accuracy(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of words that stand where they should.

    Words equal at the same place, over all sentences, divided by the words of the longer of each pair: a missing or a
    surplus word counts as wrong. Words are split at white space.
    """
    _check(hypotheses, references)
    right = total = 0
    for ours, theirs in zip(hypotheses, references, strict=True):
        our_words, their_words = ours.split(), theirs.split()
        right += sum(a == b for a, b in zip(our_words, their_words, strict=False))
        total += max(len(our_words), len(their_words))
    return right / total if total else 1.0


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"hypotheses and references must be equally many, at least one, got {len(hypotheses)} and {len(references)}"
        )
