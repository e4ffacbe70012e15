"""Definition data: tables and CODWOE's JSON, words kept whole in splits, empty glosses, words without vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmvae_fast.data.definitions import Definition, DefinitionDataset, read_definitions
from lmvae_fast.data.word_vectors import WordVectors
from lmvae_fast.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"

TABLE = (
    "lemma\tpos\tlexfile\tdefinition\n"
    "cat\tn\tnoun.animal\ta small animal\n"
    'say\tv\tverb.communication\t"to speak ""out"" loud"\n'
    "cat\tv\tverb.body\tto vomit\n"
    "Cat\tn\tnoun.person\ta jazz fan\n"
)


def test_a_table_by_its_usual_columns(tmp_path):
    (tmp_path / "d.tsv").write_text(TABLE)
    data = read_definitions(tmp_path / "d.tsv")
    assert data[0] == Definition("cat", "a small animal", "n")
    assert data[1].gloss == 'to speak "out" loud' and data[1].text == data[1].gloss
    assert len(data) == 4 and data.report.kept == 4 and data.report.format == "tsv"
    assert data.glosses_by_word()["cat", "n"] == ["a small animal"]
    assert data.sentences().texts == data.glosses
    assert data[1:3].words == ["say", "cat"]


def test_columns_by_name_and_index(tmp_path):
    (tmp_path / "d.csv").write_text("w,d\na,first\nb,second\n")
    data = read_definitions(tmp_path / "d.csv", word_column="w", gloss_column="d")
    assert data.words == ["a", "b"] and data.pos is None
    (tmp_path / "e.csv").write_text("a b,the first one\nb,the second one\n")
    data = read_definitions(tmp_path / "e.csv", word_column=0, gloss_column=1)
    assert data.words == ["a b", "b"]
    with pytest.raises(DataError, match=r"which column holds the word.*lemma"):
        read_definitions(tmp_path / "d.csv")
    with pytest.raises(DataError, match="no column 'x'"):
        read_definitions(tmp_path / "d.csv", word_column="x", gloss_column="d")
    (tmp_path / "d.jsonl").write_text(
        '{"word": "a", "gloss": "g", "pos": null}\n{"word": "b", "gloss": "h", "pos": "n"}\n'
    )
    assert read_definitions(tmp_path / "d.jsonl").pos == [None, "n"]


@pytest.mark.parametrize("row", ["dog\tn\tx\t\n", "dog\tn\tx\t  \n", "\tn\tx\tan animal\n"])
def test_an_empty_gloss_or_word_is_refused_or_counted(tmp_path, row):
    (tmp_path / "d.tsv").write_text(TABLE + row)
    with pytest.raises(DataError, match="empty"):
        read_definitions(tmp_path / "d.tsv")
    data = read_definitions(tmp_path / "d.tsv", on_empty="drop")
    assert len(data) == 4 and data.report.read == 5 and sum(data.report.dropped.values()) == 1
    with pytest.raises(DataError, match="empty"):
        DefinitionDataset(["a"], [" "])
    with pytest.raises(DataError, match="empty"):
        DefinitionDataset.from_pairs([("a", "")])
    assert DefinitionDataset.from_pairs([("a", ""), ("b", "g")], on_empty="drop").report.dropped == {"empty gloss": 1}


def test_codwoe(tmp_path):
    rows = [{"id": f"en.dev.{i}", "gloss": f"gloss {i}", "sgns": [1.0], "electra": [float(i)]} for i in range(4)]
    path = tmp_path / "en.dev.json"
    path.write_text(json.dumps(rows))
    hidden = read_definitions(path)
    assert hidden.words == hidden.keys == [row["id"] for row in rows] and not hidden.words_known
    with pytest.raises(DataError, match="hidden"):
        hidden.split((0.5, 0.5))
    path.write_text(
        json.dumps([{**row, "word": "cat" if i < 2 else f"w{i}", "pos": "n"} for i, row in enumerate(rows)])
    )
    data = read_definitions(path, limit=3)
    assert data.words == ["cat", "cat", "w2"] and data.keys[1] == "en.dev.1" and data.report.stopped_at_limit
    # Vectors of senses go by the id, those of words by the word.
    senses = WordVectors(data.keys, np.eye(3, dtype=np.float32), keyed_by="id")
    assert np.array_equal(data.with_vectors(senses)[1], np.eye(3))
    words = WordVectors(["cat", "w2"], np.eye(2, dtype=np.float32))
    assert np.array_equal(data.with_vectors(words)[1], np.eye(2)[[0, 0, 1]])
    path.write_text(json.dumps([{"id": "1", "gloss": "g"}, {"id": "2"}]))
    with pytest.raises(DataError, match="entry 1 has no 'gloss'"):
        read_definitions(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="entry 0 is no object"):
        read_definitions(path)


def test_splits_keep_words_whole():
    words = [f"w{i % 40}" if i % 3 else f"W{i % 40}" for i in range(200)]
    data = DefinitionDataset(words, [f"gloss {i}" for i in range(200)])
    parts = data.split((0.6, 0.2, 0.2), seed=3)
    assert sum(map(len, parts)) == 200
    lemmas = [{word.lower() for word in part.words} for part in parts]
    assert [len(lemma) for lemma in lemmas] == [24, 8, 8]
    assert not lemmas[0] & lemmas[1] and not lemmas[0] & lemmas[2] and not lemmas[1] & lemmas[2]
    assert parts == data.split((0.6, 0.2, 0.2), seed=3) != data.split((0.6, 0.2, 0.2), seed=4)
    for shares in ((1.0,), (0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(DataError, match="shares"):
            data.split(shares)
    with pytest.raises(DataError, match="a part of the split would be empty"):
        data[:3].split((0.9, 0.1))


def test_words_without_vectors_are_counted():
    data = DefinitionDataset(["cat", "cow", "cat"], ["one", "two", "three"], ["n", "n", "v"])
    table = WordVectors(["cat"], np.ones((1, 2), np.float32))
    with pytest.raises(DataError, match="'cow'"):
        data.with_vectors(table)
    part, vectors = data.with_vectors(table, missing="skip")
    assert part.glosses == ["one", "three"] and part.pos == ["n", "v"] and vectors.shape == (2, 2)
    assert part.report.dropped == {"word without a vector": 1} and part.report.places["word without a vector"] == [
        "row 1 (cow)"
    ]
    assert data.report.dropped == {}


def test_fingerprint_is_of_the_content():
    data = DefinitionDataset(["a", "b"], ["x", "y"])
    assert data.fingerprint() == DefinitionDataset(["a", "b"], ["x", "y"]).fingerprint()
    assert data.fingerprint() != DefinitionDataset(["a", "b"], ["x", "z"]).fingerprint()


def test_the_wordnet_definitions():
    path = SHARED / "data" / "oewn_definitions.tsv"
    if not path.is_file():
        pytest.skip("the file of WordNet definitions is not here")
    data = read_definitions(path)
    assert len(data) == 107530 and data[0].word == "able" and data[0].pos == "a"
    golden = np.load(SHARED / "golden" / "probes" / "defmod" / "glove50_oewn_lemmas.npz")
    table = WordVectors(golden["words"].tolist(), golden["vectors"], lowercase=True)
    part, vectors = data.with_vectors(table, missing="skip")
    counts = json.loads((SHARED / "golden" / "probes" / "defmod" / "README.json").read_text())["definitions"]
    assert len(part) == len(vectors) == sum(counts.values())


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_word_that_is_none_is_empty_and_other_values_are_no_words(tmp_path, name):
    def written(word, gloss="a gloss") -> Path:
        rows = [{"id": "a", "word": "null", "gloss": "nothing"}, {"id": "b", "word": word, "gloss": gloss}]
        lines = json.dumps(rows) if name == "d.json" else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(lines)
        return tmp_path / name

    with pytest.raises(DataError, match=r"(line 2|entry 1): the word is empty.*None"):
        read_definitions(written(None))
    assert read_definitions(written(None), on_empty="drop").words == ["null"]  # which is a word
    with pytest.raises(DataError, match=r"(line 2|entry 1): the gloss is empty"):
        read_definitions(written("b", None))
    for bad in (["b"], {"b": 1}, True, 3):
        with pytest.raises(DataError, match=r"(line 2|entry 1): the word is no text"):
            read_definitions(written(bad), on_empty="drop")
    with pytest.raises(DataError, match=r"(line 2|entry 1): the gloss is no text"):
        read_definitions(written("b", 3))
    data = read_definitions(written(" null ", " a\nthing "))
    assert data.words == ["null", "null"] and data.glosses[1] == "a thing"
    assert set(DefinitionDataset.from_pairs([("cat ", "a"), (" cat", "b")]).words) == {"cat"}
    assert DefinitionDataset(["cat "], ["a"]).words == ["cat"]


def test_what_is_empty_goes_by_its_line_and_nothing_after_the_limit_is_checked(tmp_path):
    (tmp_path / "d.tsv").write_text('word\tgloss\ncat\t"an\nanimal"\n\ta gloss\ndog\t\n')
    with pytest.raises(DataError, match=r"d\.tsv, line 4: the word is empty"):
        read_definitions(tmp_path / "d.tsv")
    data = read_definitions(tmp_path / "d.tsv", limit=1)
    assert data.words == ["cat"] and data.report.stopped_at_limit and data.report.read == 1
    report = read_definitions(tmp_path / "d.tsv", on_empty="drop").report
    assert report.dropped == {"empty word": 1, "empty gloss": 1} and "line 5" in report.places["empty gloss"][0]


def test_what_are_no_pairs_shares_or_vectors_is_refused():
    for bad in ([("cat",)], [("a", "b", "c", "d", "e")], ["cat"], [3], [{"word": "a", "gloss": "b"}]):
        with pytest.raises(DataError, match="pair 0 is no word with its gloss"):
            DefinitionDataset.from_pairs(bad)
    for bad in ("cat", 3, None, {"cat": "an animal"}):
        with pytest.raises(DataError, match="from_pairs takes rows"):
            DefinitionDataset.from_pairs(bad)
    with pytest.raises(DataError, match="the gloss is no text"):
        DefinitionDataset.from_pairs([("cat", 3)])
    data = DefinitionDataset.from_pairs([(f"w{i}", "g") for i in range(9)])
    for bad in (("a", "b"), ("0.5", "0.5"), 3, None, "ab", (None, 1.0), (0.5, float("nan"))):
        with pytest.raises(DataError, match="shares are out of range"):
            data.split(bad)
    for bad in (None, "glove", np.eye(3)):
        with pytest.raises(DataError, match=r"no word vectors|cannot be looked up"):
            data.with_vectors(bad)
