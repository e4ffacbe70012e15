"""Factors from labels, from generative factors and from tables, against the recorded ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lmvae_fast.data import FACTORS, SentenceDataset, generate_corpus
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes import factors


@pytest.fixture
def srl(record, arrays):
    described, file = record("disentanglement/srl.json"), arrays("disentanglement/srl.npz")
    return described, [row.split() for row in described["labels"]], file


def test_presence_and_count_are_the_recorded_factors(srl):
    described, labels, file = srl
    made = factors.from_labels(labels, groups=described["factor_labels"])
    assert made.names == tuple(described["factors"][:6])
    np.testing.assert_array_equal(made.y, file["y"][:, :6])
    counts = factors.from_labels(labels, definition="count")
    assert counts.names == ("core_roles",)
    # Recorded: 0 for one role or none. One of the 2,000 sentences has none.
    number = np.array(counts.values[0])[counts.y[:, 0]]
    np.testing.assert_array_equal(np.maximum(number - 1, 0), file["y"][:, 6])
    both = made.beside(counts)
    assert both.y.shape == (2000, 7) and both.named({6: "constant"}) == {"core_roles": "constant"}


def test_role_content_is_the_recorded_one(srl):
    described, labels, file = srl
    made = factors.role_content(described["sentences"], labels, words=described["content_values"])
    names = [None if code < 0 else made.values[0][code] for code in made.y[:, 0]]
    assert names == [None if code < 0 else described["content_values"][code] for code in file["content"]]
    frequent = factors.role_content(described["sentences"], labels, most_frequent=4)
    assert len(frequent.values[0]) <= 4 and frequent.choices["words"]


def test_langspace_sequences(srl, record):
    _, labels, _ = srl
    want = record("disentanglement/langspace.json")["sets"]["srl_langspace_factors"]
    made = factors.from_labels(labels, definition="langspace", groups=want["gen_factors"])
    for name, values, column in zip(made.names, made.values, made.y.T, strict=True):
        # Their lists begin with the label names themselves, which no sentence ever equals.
        recorded = {value: count for value, count in want["values_per_factor"][name] if not value.startswith("LABEL:")}
        counts = Counter(values[code] for code in column if code >= 0)
        assert counts == recorded, name
        assert sum(count == 1 for count in counts.values()) == want["singleton_values_per_factor"][name]


def test_chunk_prefixes_do_not_hide_roles_of_one_word():
    labels = [["B-ARG1", "B-V", "B-ARG2", "I-ARG2"], ["B-ARG1", "I-ARG1", "B-V", "O"]]
    made = factors.from_labels(labels)
    assert made.names == ("ARG1", "ARG2", "O", "V")
    assert made.y.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]] and made.values[0] == (1,) and made.values[1] == (0, 1)


def test_generative_factors_of_the_bundled_corpus():
    data = generate_corpus(300)
    made = factors.generative(data)
    assert made.names == tuple(sorted(FACTORS))
    for row in (0, 150, 299):
        assert {name: made.values[k][made.y[row, k]] for k, name in enumerate(made.names)} == data[row].factors
    some = factors.generative(data, ["negation", "number"])
    assert some.names == ("negation", "number") and some.rows(slice(10)).y.shape == (10, 2)
    with pytest.raises(DataError, match="no such factor; got: colour"):
        factors.generative(data, ["colour"])


def test_tables_of_any_values():
    made = factors.table({"score": [3, 1, None, 1], "mixed": ["a", 2, "a", True]})
    assert made.y[:, 0].tolist() == [1, 0, -1, 0] and made.values[0] == (1, 3)
    assert sorted(made.y[:, 1].tolist()) == [0, 1, 2, 2]
    assert factors.table({"x": np.array([0.5, 0.25, 0.5])}).y.ravel().tolist() == [1, 0, 1]
    assert factors.table({"x": ["", "a"]}, absent="").y.ravel().tolist() == [-1, 0]


def test_refusals():
    with pytest.raises(DataError, match="columns of one length"):
        factors.table({"a": [1, 2], "b": [1]})
    with pytest.raises(DataError, match="no single value"):
        factors.table({"a": [[1], [2]]})
    with pytest.raises(DataError, match="no generative factors"):
        factors.generative(SentenceDataset(["a b"]))
    with pytest.raises(DataError, match="no sentence has role labels"):
        factors.from_labels([None, None])
    with pytest.raises(DataError, match="needs a list of labels"):
        factors.from_labels([["V"]], groups={"verb": "V"})
    with pytest.raises(ConfigError, match="unknown definition"):
        factors.from_labels([["V"]], definition="length")
    with pytest.raises(DataError, match="row 1: labels and words differ in number"):
        factors.role_content(["a b", "c d"], [["V", "O"], ["V"]])
    with pytest.raises(DataError, match="no word bears"):
        factors.role_content(["a b"], [["V", "O"]])
    with pytest.raises(DataError, match="do not go together"):
        factors.table({"a": [1, 2]}).beside(factors.table({"a": [1, 2]}))
