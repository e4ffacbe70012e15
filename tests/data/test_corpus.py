"""The bundled corpus: distinct, deterministic, labelled, and every factor to be read off the sentence."""

import itertools
import os
import subprocess
import sys

import pytest

from lmvae_fast.data import FACTORS, corpus, corpus_size, generate_corpus
from lmvae_fast.data.lexicon import NOUNS
from lmvae_fast.data.stable_random import below, distinct_below, generator, shuffled
from lmvae_fast.errors import DataError


@pytest.fixture(scope="module")
def default():
    return generate_corpus()


def test_default_corpus_is_what_was_promised(default):
    assert len(default) == len(set(default.texts)) == 20000
    lengths = [len(text.split()) for text in default.texts]
    assert min(lengths) >= 3
    assert max(lengths) <= 16
    assert 6.5 < sum(lengths) / 20000 < 8.5
    assert sum(5 <= length <= 9 for length in lengths) > 15000
    counts = default.word_counts()
    assert 300 <= len(counts) <= 450
    assert min(counts.values()) >= 5  # no word that a model could not learn
    assert default.report.kept == 20000


def test_predicates_are_balanced_and_most_sentences_say_what_is_so(default):
    predicates = [factors["predicate"] for factors in default.factors]
    counts = {name: predicates.count(name) for name in FACTORS["predicate"]}
    assert max(counts.values()) - min(counts.values()) <= 1
    negative = sum(factors["negation"] == "negative" for factors in default.factors)
    assert 0.2 < negative / 20000 < 0.4


def test_every_sentence_of_the_grammar_is_another_and_its_factors_are_known():
    seen = set()
    values = {name: set() for name in FACTORS}
    for block in corpus._blocks():
        for index in range(block.size):
            text, labels, factors = block.sentence(index)
            words = text.split()
            assert len(labels) == len(words)
            assert 3 <= len(words) <= 16
            for name, value in factors.items():
                values[name].add(value)
            seen.add(text)
    assert len(seen) == corpus_size() >= 20000
    assert {name: tuple(sorted(found)) for name, found in values.items()} == FACTORS


def test_every_factor_can_be_read_off_the_sentence(default):
    for example in default[:4000]:
        words, factors = example.text.split(), example.factors
        assert tuple(factors) == tuple(FACTORS)
        noun = NOUNS[factors["subject"]]
        assert factors["topic"] == noun.topic
        place = words.index(noun.plural if factors["number"] == "plural" else noun.singular)
        assert factors["number"] == ("mass" if noun.plural is None else factors["number"])
        before = words[place - 1] if place else ""
        modifiers = set(FACTORS["modifier"]) - {"none"}
        assert (before in modifiers) == (factors["modifier"] != "none")
        if factors["modifier"] != "none":
            assert before == factors["modifier"]
            place -= 1
            before = words[place - 1] if place else ""
        quantifier = {"an": "a"}.get(before, before)
        assert factors["quantifier"] == (quantifier if quantifier in FACTORS["quantifier"] else "none")
        assert factors["negation"] == ("negative" if "not" in words else "affirmative")
        adverbs = set(FACTORS["adverb"]) - {"none"}
        assert [word for word in words if word in adverbs] == [word for word in [factors["adverb"]] if word != "none"]
        # The last word of an object or adjunct stands in the sentence whatever the verb's form.
        assert factors["object"].split()[-1] in words
        if factors["adjunct"] != "none":
            assert factors["adjunct"].split()[-1] in words


def test_roles_follow_the_words(default):
    function = {"not": {"ARGM-NEG"}, "can": {"ARGM-MOD"}, "will": {"ARGM-MOD"}, "then": {"O"}}
    for example in default[:4000]:
        pairs = list(zip(example.text.split(), example.labels, strict=True))
        assert example.labels.count("V") == 1
        assert all(label in function[word] for word, label in pairs if word in function)
        for (word, _), (following, _) in itertools.pairwise(pairs):
            if word in ("a", "an"):
                assert (word == "an") == (following[0] in "aeiou"), example.text


@pytest.mark.parametrize(
    ("sentence", "labels"),
    [
        ("a dog is a kind of mammal", "ARG1 ARG1 V ARG2 ARG2 ARG2 ARG2"),
        ("most bears do not usually eat wood", "ARG0 ARG0 O ARGM-NEG ARGM-TMP V ARG1"),
        ("frogs live in a pond", "ARG0 V ARGM-LOC ARGM-LOC ARGM-LOC"),
        ("an oak needs water to grow", "ARG0 ARG0 V ARG1 ARGM-PRP ARGM-PRP"),
        ("a window is made of glass", "ARG1 ARG1 O V ARG2 ARG2"),
        ("the wild penguin can not fly", "ARG0 ARG0 ARG0 ARGM-MOD ARGM-NEG V"),
        (
            "if iron is heated then it will expand",
            "ARGM-ADV ARGM-ADV ARGM-ADV ARGM-ADV O ARG1 ARGM-MOD V",
        ),
        (
            "if small ferns get no water then they will die",
            "ARGM-ADV ARGM-ADV ARGM-ADV ARGM-ADV ARGM-ADV ARGM-ADV O ARG1 ARGM-MOD V",
        ),
        (
            "melting is when iron changes into a liquid by adding heat",
            "ARG1 V ARG2 ARG2 ARG2 ARG2 ARG2 ARG2 ARG2 ARG2 ARG2",
        ),
    ],
)
def test_sentences_the_grammar_must_have(sentence, labels):
    found = [
        block.sentence(index)
        for block in corpus._blocks()
        if block.fact.noun in sentence or (NOUNS[block.fact.noun].plural or "-") in sentence
        for index in range(block.size)
        if block.sentence(index)[0] == sentence
    ]
    assert [" ".join(roles) for _, roles, _ in found] == [labels]


def test_the_same_seed_gives_the_same_corpus_everywhere():
    # Recorded: no change of Python version, platform or hash seed may change what a seed means.
    data = generate_corpus(300, seed=7)
    assert data.texts[:3] == [
        "wild cows do not contain plastic",
        "most large eyes are often used for seeing light",
        "some healthy lungs do not need electricity to grow",
    ]
    assert data.fingerprint().startswith("74e44067f20e5d0d")
    code = "from lmvae_fast.data import generate_corpus; print(generate_corpus(300, seed=7).fingerprint())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == data.fingerprint()
    assert generate_corpus(300, seed=8).texts != data.texts


def test_small_large_and_impossible_sizes():
    assert len(generate_corpus(1)) == 1
    # Everything the grammar has: each block gives all of its sentences.
    sizes = [block.size for block in corpus._blocks()]
    assert corpus._shares(corpus._blocks(), corpus_size(), generator(0)) == sizes
    for number in (0, -1, corpus_size() + 1, 1.5, True):
        with pytest.raises(DataError, match=str(corpus_size())):
            generate_corpus(number)
    with pytest.raises(DataError, match="seed"):
        generate_corpus(10, seed=-1)


def test_shares_follow_weights_up_to_capacity():
    assert sorted(corpus._fill([100, 100, 100], [1, 1, 1], 31, generator(0))) == [10, 10, 11]
    assert corpus._fill([100, 2, 100], [1, 1, 1], 30, generator(0)) == [14, 2, 14]
    assert corpus._fill([100, 100], [3, 1], 40, generator(0)) == [30, 10]
    assert corpus._fill([3, 4], [3, 1], 7, generator(0)) == [3, 4]


def test_held_out_sentences_are_not_trained_on(default):
    train, held_out = default.split(held_out=0.1, seed=0)
    assert (len(train), len(held_out)) == (18000, 2000)
    assert not set(train.texts) & set(held_out.texts)
    # What is held out is new as a whole, not in its words.
    assert set(held_out.word_counts()) <= set(train.word_counts())


def test_stable_random_draws():
    source = generator(5)
    draws = [below(source, 7) for _ in range(7000)]
    assert set(draws) == set(range(7))
    assert all(850 < draws.count(value) < 1150 for value in range(7))
    assert sorted(shuffled(range(50), 1)) == list(range(50))
    assert shuffled(range(50), 1) != list(range(50))
    assert sorted(distinct_below(generator(2), 40, 40)) == list(range(40))
    few = distinct_below(generator(2), 10**12, 5)
    assert len(set(few)) == 5
    assert max(few) < 10**12
    with pytest.raises(ValueError, match="distinct"):
        distinct_below(generator(2), 3, 4)
