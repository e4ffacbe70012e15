"""Tables in memory and on disk, and files whose form is easily mistaken."""

from __future__ import annotations

import json

import pytest

import lmvae_fast as lf
from lmvae_fast.data.readers import field_names
from lmvae_fast.errors import DataError

TEXTS = ["a cat", "a dog"]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_tables_in_memory():
    assert lf.read({"label": [0, 1], "text": TEXTS}).texts == TEXTS
    assert lf.read({"label": [0, 1], "words": TEXTS}, column="words").texts == TEXTS
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": [*TEXTS, None], "kind": ["x", "y", "z"]})
    found = lf.read(frame, factor_columns=["kind"])
    assert found.texts == TEXTS and found.factors == [{"kind": "x"}, {"kind": "y"}]
    assert found.report.dropped == {"empty": 1}


class Columns:
    """What ``datasets.Dataset`` looks like to a reader."""

    column_names = ("sentence",)

    def __getitem__(self, name):
        return TEXTS


def test_a_dataset_of_columns():
    assert lf.read(Columns()).texts == TEXTS


def test_a_mapping_of_sentences_is_no_table():
    with pytest.raises(DataError, match=r"list\(mapping\.values"):
        lf.read({"a": "a cat", "b": "a dog"})


@pytest.mark.parametrize("value", [[{"text": "a cat"}, "a dog"], {"text": TEXTS}], ids=["records", "columns"])
def test_json_files(tmp_path, value):
    assert lf.read(write(tmp_path, "x.json", json.dumps(value))).texts == TEXTS


@pytest.mark.parametrize("content", ["", "{", "3", '{"a": 1}', "[[1]]"])
def test_json_files_that_hold_no_sentences(tmp_path, content):
    with pytest.raises(DataError):
        lf.read(write(tmp_path, "x.json", content))


def test_parquet_files(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "x.parquet")
    assert lf.read(tmp_path / "x.parquet").texts == TEXTS
    with pytest.raises(DataError, match="cannot read"):
        lf.read(write(tmp_path, "y.parquet", "no parquet"))


def test_the_first_row_of_a_single_column_is_asked_about(tmp_path):
    path = write(tmp_path, "words.csv", "apple\nbanana\n")
    with pytest.raises(DataError, match="header"):
        lf.read(path)
    assert lf.read(path, header=False).texts == ["apple", "banana"]
    assert lf.read(path, header=True).texts == ["banana"]
    assert lf.read(write(tmp_path, "named.csv", "text\na cat\n")).texts == ["a cat"]


def test_semicolons_and_old_line_ends(tmp_path):
    assert lf.read(write(tmp_path, "a.csv", "id;text\n1;a cat\n2;a dog\n")).texts == TEXTS
    assert lf.read(write(tmp_path, "a.txt", b"a cat\ra dog\r")).texts == TEXTS
    assert lf.read(write(tmp_path, "b.txt", b"a cat\r\na dog\r\n")).texts == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_and_without_its_mark(tmp_path, encoding):
    with pytest.raises(DataError, match="iconv"):
        lf.read(write(tmp_path, "x.txt", "a cat\n".encode(encoding)))


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("options", [{"column": 0}, {"column": 1}, {"column": 0, "label_column": 1}])
def test_a_first_row_of_words_is_asked_about(tmp_path, name, sign, options):
    path = write(tmp_path, name, f"cat{sign}animal\ndog{sign}mammal\n")
    with pytest.raises(DataError, match="header=True"):
        lf.read(path, **options)
    first = [("cat", "dog"), ("animal", "mammal")][options["column"]]
    assert tuple(lf.read(path, **options, header=False).texts) == first
    assert tuple(lf.read(path, **options, header=True).texts) == first[1:]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["id{0}text\n", ""])
def test_other_delimiters_are_read_or_asked_about(tmp_path, name, sign, header):
    rows = header.format(sign) + f"1{sign}a cat\n2{sign}a dog\n"
    path = write(tmp_path, name, rows)
    assert lf.read(path, column=1, delimiter=sign).texts == TEXTS
    if name == "a.tsv" and sign == "," and not header:  # the sentences' own, for all that is known
        with pytest.raises(DataError, match="delimiter="):
            lf.read(path, column=1)
        assert lf.read(path, delimiter="\t").texts == ["1,a cat", "2,a dog"]
    else:
        assert lf.read(path, column=1).texts == TEXTS
        assert field_names(path) == (["id", "text"] if header else [])


def test_a_file_that_can_be_parted_in_two_ways_is_asked_about(tmp_path):
    path = write(tmp_path, "a.csv", "1;a cat, a dog\n2;a dog, a cat\n")
    with pytest.raises(DataError, match="',' or ';'"):
        lf.read(path, column=1)
    assert lf.read(path, column=1, delimiter=";").texts == ["a cat, a dog", "a dog, a cat"]
    assert lf.read(write(tmp_path, "b.csv", "id;text\n1;a cat, a dog\n2;a dog\n")).texts == ["a cat, a dog", "a dog"]
    assert lf.read(write(tmp_path, "c.csv", 'id,text\n1,a cat; a dog\n2,"a; b"\n')).texts == ["a cat; a dog", "a; b"]
    for delimiter in ("", ";;", '"', 3):
        with pytest.raises(DataError, match="single character"):
            lf.read(path, delimiter=delimiter)
    with pytest.raises(DataError, match="no delimiter"):
        lf.read(write(tmp_path, "a.txt", "a cat\n"), delimiter=";")


def test_a_damaged_line_behind_the_limit_is_not_looked_at(tmp_path):
    path = write(tmp_path, "a.csv", b"id;text\n1;a cat\n2;\xff\n")
    assert lf.read(path, limit=1).texts == ["a cat"]
    with pytest.raises(DataError, match="line 3"):
        lf.read(path)


def test_definitions_with_another_delimiter(tmp_path):
    path = write(tmp_path, "a.csv", "cat;an animal, small\ndog;an animal, large\n")
    with pytest.raises(DataError, match="delimiter="):
        lf.read_definitions(path, word_column=0, gloss_column=1)
    found = lf.read_definitions(path, word_column=0, gloss_column=1, header=False, delimiter=";")
    assert [pair.gloss for pair in found] == ["an animal, small", "an animal, large"]
