"""Text measures within prompts: means over prompts of figures that are tested by themselves, and ROUGE of the package."""

from __future__ import annotations

import pytest

from lmvae_fast.errors import DataError
from lmvae_fast.probes.response_quality import response_quality
from lmvae_fast.probes.text import distinct_n, rouge_lsum, self_bleu

OURS = [["the cat sat on the mat", "a dog ran over the hill", ""], ["ice is cold today", "the ice is cold today"]]
THEIRS = [["the cat sat on a mat", "a dog ran up", "no"], ["ice is cold", "ice is cold today"]]


def test_rouge_lsum_of_lines_and_of_pairs():
    pytest.importorskip("rouge_score")
    # five of six words in order, on both sides
    assert rouge_lsum(["the cat sat on the mat"], ["the cat sat on a mat"]) == pytest.approx(5 / 6)
    assert rouge_lsum(["one\ntwo three"], ["two three\none"]) == 1.0  # lines are sentences, in any order
    assert rouge_lsum(["cats"], ["cat"]) == 0.0 and rouge_lsum(["cats"], ["cat"], stemmed=True) == 1.0
    with pytest.raises(DataError, match="equally many"):
        rouge_lsum(["a"], ["a", "b"])


def test_means_over_prompts():
    found = response_quality(OURS)
    said = [["the cat sat on the mat", "a dog ran over the hill", "."], OURS[1]]  # an empty one becomes "."
    assert found["self_bleu"] == pytest.approx(sum(self_bleu(texts, form="nmt") for texts in said) / 2)
    assert found["distinct_4"] == pytest.approx(sum(distinct_n(texts, 4) for texts in said) / 2)
    assert found.keys() == {"self_bleu", "distinct_4"}


def test_references_as_one_text_or_pair_by_pair():
    pytest.importorskip("rouge_score")
    joined = response_quality(OURS, THEIRS)["rouge_lsum"]
    lines = [rouge_lsum(["\n".join(a) if all(a) else "\n".join([*a[:-1], "."])], ["\n".join(b)])
             for a, b in zip(OURS, THEIRS, strict=True)]  # fmt: skip
    assert joined == pytest.approx(sum(lines) / 2)
    paired = response_quality(OURS, THEIRS, paired=True)["rouge_lsum"]
    assert paired != joined and len(paired.details["prompts"]) == 2
    embedded = response_quality(
        [row * 4 for row in OURS], [row * 4 for row in THEIRS], clusters=2, seeds=(0,),
        embed=lambda texts: [[float(len(text)), float(text.count("a")), 1.0] for text in texts],
    )  # fmt: skip
    assert 0.0 <= embedded["mauve"] <= 1.0


@pytest.mark.parametrize(
    ("ours", "theirs", "paired"),
    [([], None, False), ([["alone"]], None, False), ("text", None, False), (OURS, THEIRS[:1], False),
     (OURS, [THEIRS[0][:2], THEIRS[1]], True)],
)  # fmt: skip
def test_what_does_not_fit_is_refused(ours, theirs, paired):
    with pytest.raises(DataError):
        response_quality(ours, theirs, paired=paired)
