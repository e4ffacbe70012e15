"""How close decoded sentences come to their originals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# Scripts written without spaces between words, by code point.
_SCRIPTS = (
    ("han", 0x3400, 0x9FFF),
    ("han", 0x20000, 0x323AF),
    ("kana", 0x3040, 0x30FF),
    ("spaceless", 0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    ("spaceless", 0x1000, 0x109F),  # Burmese
    ("spaceless", 0x1780, 0x17FF),  # Khmer
)


def bleu(hypotheses: Sequence[str], references: Sequence[str], tokenize: str | None = None) -> float:
    """Corpus BLEU-4 of sacrebleu (exponential smoothing, case kept), on a scale of 0 to 1.

    tokenize: sacrebleu's tokenizer: ``13a`` for words, ``zh`` for Chinese, ``char`` for every other script without spaces; by
    default the one that the references' script asks for. There is a warning where not even the references themselves would
    score, for want of four tokens in a row.
    """
    _check(hypotheses, references)
    import sacrebleu  # a second of import time that only this figure needs

    chosen = script_tokenizer(references) if tokenize is None else tokenize
    if tokenize is None and chosen != "13a":
        logger.warning("the references are not written in words between spaces: BLEU is taken over tokens %r", chosen)
    score = sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=chosen).score
    if score == 0 and sacrebleu.corpus_bleu(list(references), [list(references)], tokenize=chosen).score == 0:
        logger.warning("no reference has four tokens (%s): BLEU is 0 even of texts that are the same", chosen)
    return min(score / 100.0, 1.0)  # rounding may leave it a little above


def script_tokenizer(texts: Sequence[str]) -> str:
    """Sacrebleu's tokenizer for a script: ``zh`` where most letters are Chinese, ``char`` where most are of another script
    without spaces (Japanese, Korean kept apart as it has spaces; Thai, Lao, Tibetan, Khmer, Burmese), ``13a`` otherwise."""
    counts = Counter(_script(character) for text in texts for character in text if character.isalpha())
    letters = sum(counts.values())
    if counts["kana"] + counts["han"] > letters / 2:
        return "char" if counts["kana"] > counts["han"] / 10 else "zh"
    return "char" if counts["spaceless"] > letters / 2 else "13a"


def _script(character: str) -> str:
    point = ord(character)
    for name, first, last in _SCRIPTS:
        if first <= point <= last:
            return name
    return "spaced"


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of sentences that agree word for word."""
    _check(hypotheses, references)
    equal = sum(ours.split() == theirs.split() for ours, theirs in zip(hypotheses, references, strict=True))
    return equal / len(references)


def token_accuracy(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of words that stand where they should; of characters in a script without spaces.

    Words equal at the same place, over all sentences, divided by the words of the longer of each pair: a missing or a
    surplus word counts as wrong. Words are split at white space.
    """
    _check(hypotheses, references)
    words = script_tokenizer(references) == "13a"
    right = total = 0
    for ours, theirs in zip(hypotheses, references, strict=True):
        our_words, their_words = (text.split() if words else list(text) for text in (ours, theirs))
        right += sum(a == b for a, b in zip(our_words, their_words, strict=False))
        total += max(len(our_words), len(their_words))
    return right / total if total else 1.0


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"hypotheses and references must be equally many, at least one, got {len(hypotheses)} and {len(references)}"
        )
