"""Readers on made files, good and bad, and on the real ones."""

import gzip
import json

import pytest

from lmvae_fast.data import read
from lmvae_fast.errors import DataError


def write(folder, name, content):
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def test_text_lines(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\r\n\n  two words \nthree & four\nlast without a break")
    data = read(path)
    assert data.texts == ["one", "two words", "three & four", "last without a break"]
    assert data.labels is None
    assert data.report.format == "txt"
    assert data.report.dropped == {"empty": 1}
    assert data.report.places["empty"] == [f"{path}, line 2"]
    assert read(path, limit=2).texts == ["one", "two words"]
    with pytest.raises(DataError, match=r"line 2.*empty"):
        read(path, on_empty="error")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.TXT", "a.jsonl.gz"])
def test_endings(tmp_path, name):
    path = write(tmp_path, name, '"one"\n"two"\n' if "jsonl" in name else "one\ntwo\n")
    assert read(path).texts == ["one", "two"]


def test_srl_lines_are_recognised(tmp_path):
    lines = "salt & pepper mix & ARG1 ARG1 ARG1 V\nice melts &  ARG1 V \n\n"
    path = write(tmp_path, "a.txt", lines)
    data = read(path)
    assert data.report.format == "srl"
    assert data.texts == ["salt & pepper mix", "ice melts"]
    assert data.labels == [("ARG1", "ARG1", "ARG1", "V"), ("ARG1", "V")]
    assert data.report.dropped == {"empty": 1}
    # Said to be text, it is text.
    assert read(path, format="txt").texts[1] == "ice melts &  ARG1 V"
    # An ampersand alone makes no SRL: neither too few labels, nor lower case, nor a company's name.
    for text in ("he & she", "AT & T", "two words & V"):
        assert read(write(tmp_path, "b.txt", text)).report.format == "txt"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ice melts & ARG1", r"line 2.*1 labels for 'ice melts'.*2 labels"),
        ("ice melts & ARG1 V V", r"line 2.*3 labels"),
        ("ice melts", r"line 2.*no labels"),
    ],
)
def test_srl_lines_with_a_wrong_number_of_labels(tmp_path, line, message):
    path = write(tmp_path, "a.srl", f"ice melts & ARG1 V\n{line}\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_jsonl(tmp_path):
    rows = [
        {"text": "ice melts", "labels": ["ARG1", "V"], "factors": {"topic": "matter"}},
        {"sentence": "rain falls"},
        "dogs run",
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    data = read(path)
    assert data.texts == ["ice melts", "rain falls", "dogs run"]
    assert data.labels == [("ARG1", "V"), None, None]
    assert data.factors == [{"topic": "matter"}, None, None]
    path = write(tmp_path, "b.jsonl", '{"s": "x y", "tags": ["A", "B"], "n": 3, "class": "c"}\n')
    data = read(path, column="s", label_column="tags", factor_columns={"kind": "class", "size": "n"})
    assert data.labels == [("A", "B")]
    assert data.factors == [{"kind": "c", "size": "3"}]


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('{"text": "x"', {}, r"line 2.*malformed JSON at character 13"),
        ("[1, 2]", {}, r"line 2.*not a JSON object.*list"),
        ("nan", {}, r"line 2.*malformed"),
        ('{"other": "x"}', {}, r"line 2.*no field 'text'.*'other'"),
        ('{"text": "x"}', {"column": "sentence"}, r"line 1.*no field 'sentence'.*'text'"),
        ('{"text": 5}', {}, r"line 2.*not a string"),
        ('{"text": null}', {}, r"line 2.*not a string"),
        ('"x"', {"column": "text"}, r"line 2.*not a JSON object.*str"),
        ('{"text": "x"}', {"column": 0}, r"by its name"),
        ('{"text": "x y", "labels": ["V"]}', {}, r"line 2.*1 labels"),
        ("[" * 100000, {}, r"line 2.*malformed"),
    ],
)
def test_bad_jsonl(tmp_path, line, options, message):
    path = write(tmp_path, "a.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(path, **options)


def test_tables_by_name_and_by_index(tmp_path):
    path = write(tmp_path, "a.csv", 'id,sentence,topic\n1,"a, quoted ""one""",x\n2,plain,y\n')
    assert read(path).texts == ['a, quoted "one"', "plain"]
    assert read(path, column="sentence").texts == read(path, column=1).texts == read(path).texts
    assert read(path, column="sentence").report.read == 2
    data = read(path, column=1, factor_columns=["topic"])
    assert data.factors == [{"topic": "x"}, {"topic": "y"}]
    assert read(path, column=1, header=False).texts[0] == "sentence"
    path = write(tmp_path, "b.tsv", "0\tno good .\n1\tvery good .\n\n")
    data = read(path, column=1, factor_columns={"sentiment": 0})
    assert data.texts == ["no good .", "very good ."]
    assert data.factors == [{"sentiment": "0"}, {"sentiment": "1"}]
    assert data.report.dropped == {"empty": 1}
    path = write(tmp_path, "c.tsv", "text\tlabels\nice melts\tARG1 V\n")
    assert read(path, label_column="labels").labels == [("ARG1", "V")]
    assert read(write(tmp_path, "d.csv", "one sentence\nanother one\n")).texts == ["one sentence", "another one"]


def test_quotes_of_a_table(tmp_path):
    path = write(tmp_path, "a.tsv", '1\t"spans\ntwo lines"\n2\tplain\n3\t"open to the end\n')
    # The quoted field covers lines 1 and 2, so the open quote stands on line 4.
    with pytest.raises(DataError, match=r"line 4.*malformed tsv.*quoting=False"):
        read(path, column=1)
    assert read(path, column=1, limit=2).texts == ["spans two lines", "plain"]
    path = write(tmp_path, "b.tsv", '1\t"open\n2\t"quoted"\n')
    assert read(path, column=1, quoting=False).texts == ['"open', '"quoted"']


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"which column.*3 columns"),
        ({"column": "text"}, r"no column 'text'.*allowed: id, body, kind"),
        ({"column": 3}, r"no column 3.*indices 0 to 2"),
        ({"column": -1}, r"no column -1"),
        ({"column": "body", "header": False}, r"no column 'body'.*no header"),
        ({"column": 1, "label_column": "tags"}, r"no column 'tags'"),
        ({"column": 1, "factor_columns": "kind"}, r"factor_columns.*\['kind'\]"),
    ],
)
def test_columns_that_do_not_exist(tmp_path, options, message):
    path = write(tmp_path, "a.csv", "id,body,kind\n1,a b,c\n")
    with pytest.raises(DataError, match=message):
        read(path, **options)


def test_rows_of_another_width(tmp_path):
    path = write(tmp_path, "a.csv", "id,text\n1,a b\n2,a,b\n")
    with pytest.raises(DataError, match=r"line 3.*3 fields.*2 fields"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.srl", "a.txt.gz"])
def test_files_without_sentences(tmp_path, name):
    for content in ("", "\n \n"):
        with pytest.raises(DataError, match="dataset is empty"):
            read(write(tmp_path, name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"no file.*missing\.txt"):
        read(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path, format="txt")
    with pytest.raises(DataError, match=r"line 2.*not UTF-8.*0xe9 at byte 3.*iconv"):
        read(write(tmp_path, "latin.txt", "one\ncaf\xe9\n".encode("latin-1")))
    with pytest.raises(DataError, match=r"line 2.*not UTF-8"):
        read(write(tmp_path, "latin.csv", "text\ncaf\xe9\n".encode("latin-1")))
    whole = gzip.compress(b"a line that is long enough to be cut\n" * 2000)
    for name, content in (("cut.txt.gz", whole[: len(whole) // 2]), ("no.txt.gz", b"not gzip at all")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match="reading stopped"):
            read(path)


def test_options_that_contradict(tmp_path):
    path = write(tmp_path, "a.txt", "one\n")
    with pytest.raises(DataError, match="unknown file format"):
        read(path, format="xml")
    with pytest.raises(DataError, match="has no columns"):
        read(path, column="text")
    with pytest.raises(DataError, match="on_empty"):
        read(path, on_empty="keep")
    with pytest.raises(DataError, match="limit"):
        read(path, limit=0)
    with pytest.raises(DataError, match=r"cannot tell the format.*\.doc"):
        read(write(tmp_path, "a.doc", "one\n"))
    with pytest.raises(DataError, match="cannot tell the format"):
        read(write(tmp_path, "noending", "one\n"))
    assert read(tmp_path / "noending", format="txt").texts == ["one"]


# Real files ---------------------------------------------------------------------------------------------------------


def test_worldtree(shared):
    data = read(shared / "data" / "worldtree_srl_train.txt")
    assert data.report.format == "srl"
    assert len(data) == 12000
    assert data[1].text == "fertilizers contain nitrogen"
    assert data[1].labels == ("ARG0", "V", "ARG1")
    assert {"V", "ARG0", "ARG1", "ARG2", "ARGM-TMP"} <= set(data.label_set())
    train, held_out = data.split(held_out=0.1, seed=0)
    assert not set(train.texts) & set(held_out.texts)


def test_wordnet_definitions(shared):
    data = read(shared / "data" / "oewn_definitions.tsv", column="definition", factor_columns=["pos"])
    assert len(data) == 107530
    assert data.texts[0].startswith("(usually followed by")
    # The one row with doubled quotes, read as RFC 4180 says.
    assert any(text.startswith("a report of a discourse") and 'said "I am a fool"' in text for text in data.texts)
    assert set(data.factor_values()["pos"]) <= set("nvars")
    assert read(shared / "data" / "oewn_definitions.tsv", column=3).texts == data.texts  # its header is recognised


def test_sts(shared):
    for column in (0, 1):
        data = read(shared / "data" / "stsb_en_dev.csv", column=column, factor_columns={"score": 2})
        assert len(data) == 1500
        assert data.factors[0] == {"score": "5.0"}
    with pytest.raises(DataError, match="which column"):
        read(shared / "data" / "stsb_en_dev.csv")


def test_yelp(shared):
    data = read(shared / "data" / "yelp_sentences_train.txt", format="tsv", column=1, factor_columns={"sentiment": 0})
    assert len(data) + sum(data.report.dropped.values()) == 10000
    assert data.factor_values() == {"sentiment": ("0", "1")}
    assert data[0].text == "the staff is always really friendly and willing to help ."


def test_dialogues(shared):
    data = read(shared / "data" / "dailydialog_valid.txt")
    assert data.report.format == "txt"
    assert len(data) == 1000
    assert all("__eou__" in text for text in data.texts)


def test_entailment_trees(shared):
    data = read(shared / "data" / "entailmentbank_task1_dev.jsonl", column="hypothesis", factor_columns=["id"])
    assert len(data) == 187
    assert data.factors[0]["id"] == "Mercury_SC_401371"
