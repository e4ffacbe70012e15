"""Text figures on sentences whose scores are known."""

import math

import pytest

from lmvae_fast.evaluation import bleu, exact_match, token_accuracy
from lmvae_fast.evaluation.text import script_tokenizer


def test_bleu_of_known_sentences():
    reference = "the cat sat on the mat near the door"
    assert bleu([reference], [reference]) == pytest.approx(1.0)
    # One of nine words changed at the end: precisions 8/9, 7/8, 6/7, 5/6; equal lengths.
    changed = "the cat sat on the mat near the wall"
    assert bleu([changed], [reference]) == pytest.approx((8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** 0.25)
    # A prefix of seven of the nine: every precision 1, so only the brevity penalty exp(1 - 9/7).
    assert bleu(["the cat sat on the mat near"], [reference]) == pytest.approx(math.exp(1 - 9 / 7))
    assert bleu(["dogs run fast today"], [reference]) < 0.1


def test_bleu_is_of_the_corpus_not_a_mean_of_sentences():
    references = ["a b c d e f g h", "x y z w"]
    hypotheses = ["a b c d e f g h", "x y q w"]
    # Matches pooled over both: 8 + 3 of 12 words, 7 + 1 of 10 pairs, 6 of 8 triples, 5 of 6 quadruples.
    pooled = (11 / 12 * 8 / 10 * 6 / 8 * 5 / 6) ** 0.25
    assert bleu(hypotheses, references) == pytest.approx(pooled)


def test_exact_match_ignores_only_white_space():
    assert exact_match(["a  cat ", "a dog", "A cat"], ["a cat", "a cat", "a cat"]) == pytest.approx(1 / 3)


def test_token_accuracy_counts_missing_and_surplus_words_as_wrong():
    assert token_accuracy(["a cat sat"], ["a cat sat"]) == 1.0
    assert token_accuracy(["a dog sat"], ["a cat sat"]) == pytest.approx(2 / 3)
    assert token_accuracy(["a cat"], ["a cat sat down"]) == pytest.approx(2 / 4)
    assert token_accuracy(["a cat sat down"], ["a cat"]) == pytest.approx(2 / 4)
    # Pooled over sentences, not a mean of their shares.
    assert token_accuracy(["a", "b c d"], ["a", "x y z"]) == pytest.approx(1 / 4)
    # Nothing was to be said and nothing was said.
    assert token_accuracy([""], [""]) == 1.0


@pytest.mark.parametrize("figure", [bleu, exact_match, token_accuracy])
def test_unequal_numbers_are_refused(figure):
    with pytest.raises(ValueError, match="2 and 1"):
        figure(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        figure([], [])


CHINESE = ["今天天气很好我们去公园散步吧", "植物需要水和阳光"]


def test_scripts_without_spaces_are_measured_by_character(caplog):
    assert bleu(CHINESE, CHINESE) == pytest.approx(1.0)
    assert "zh" in caplog.text
    assert bleu(CHINESE, CHINESE, tokenize="13a") == 0.0  # one word a sentence: no 4-gram
    near = [text[:-1] for text in CHINESE]
    assert token_accuracy(near, CHINESE) == pytest.approx(20 / 22)
    assert script_tokenizer(["これは猫です"]) == "char" and script_tokenizer(["แมวเป็นสัตว์"]) == "char"
    assert script_tokenizer(["a cat", "고양이는 동물이다"]) == "13a"


@pytest.mark.parametrize("texts", [["a cat", "dogs bark"], ["고양이는 동물이다"], ["a cat sat"]])
def test_bleu_warns_where_equal_texts_score_nothing(texts, caplog):
    assert bleu(texts, texts) == 0.0
    assert "BLEU is 0 even of texts that are the same" in caplog.text
    caplog.clear()
    assert bleu(["dogs run"], ["the cat sat on a mat"]) == 0.0 and not caplog.text


def test_tibetan_has_no_spaces():
    text = "བོད་སྐད་ཀྱི་ཡི་གེ"
    assert script_tokenizer([text]) == "char" and bleu([text], [text]) == pytest.approx(1.0)
