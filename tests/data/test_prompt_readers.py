"""The layouts of prompt-response files: small ones written here, and the real samples."""

from __future__ import annotations

import gzip

import pytest

from lmvae_fast.data import PromptResponse, read_prompts, read_texts
from lmvae_fast.data.prompt_readers import without_token_spaces
from lmvae_fast.errors import DataError

END = "<|eot_id|>"


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def pairs(dataset):
    return [(row.prompt, row.response) for row in dataset]


def test_token_spaces():
    spaced = " I do n't know , sir . It 's \" good \" , they 've said ! "
    assert without_token_spaces(spaced) == "I don't know, sir. It's \" good \", they've said!"


def test_json_lines(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"prompt": "a", "responses": ["b", "c"]}\n\n{"prompt": "d", "response": "e", "label": "x"}\n')
    dataset = read_prompts(path)
    assert pairs(dataset) == [("a", "b"), ("a", "c"), ("d", "e")] and dataset.labels == [None, None, "x"]
    for line, message in (("{", "line 1: malformed JSON"), ('["a"]', "line 1: not a JSON object")):
        with pytest.raises(DataError, match=message):
            read_prompts(write(tmp_path, "bad.jsonl", line))


def test_tables(tmp_path):
    tsv = write(tmp_path, "p.tsv", 'kind\tprompt\tresponse\nx\ta "b\tc\ny\td\t \n')
    dataset = read_prompts(tsv, label_column="kind")
    assert (
        pairs(dataset) == [('a "b', "c")]
        and dataset.labels == ["x"]
        and dataset.report.dropped == {"empty response": 1}
    )
    csv = write(tmp_path, "p.csv", '"a, b",c\nd,e\n')
    assert pairs(read_prompts(csv, columns=(0, 1))) == [("a, b", "c"), ("d", "e")]
    assert pairs(read_prompts(csv, columns=(1, 0), limit=1)) == [("c", "a, b")]
    for columns, message in (
        ((0, 2), "line 1: there is no column 2"),
        (("prompt", 1), "no column 'prompt'"),
        ((0,), "two"),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(csv, columns=columns)


def test_dialogues_answer_all_that_was_said_before(tmp_path):
    path = write(
        tmp_path,
        "d.txt",
        "Hello , you . __eou__ Hi ! __eou__ Who is it ? __eou__\nBye . __eou__\nA __eou__ B __eou__\n",
    )
    dataset = read_prompts(path, layout="dailydialog")
    assert pairs(dataset) == [
        (f"Hello, you.{END}", f"Hi!{END}"), (f"Hello, you.{END}Hi!{END}", f"Who is it?{END}"), (f"A{END}", f"B{END}")
    ]  # fmt: skip
    acts = write(tmp_path, "acts.txt", "1 2 4\n1\n1 3\n")
    assert read_prompts(path, layout="dailydialog", acts=acts).labels == ["question", "commissive", "directive"]
    for text, message in (
        ("1 2\n1\n1 1\n", "line 1: labels and utterances differ in number"),
        ("1 2 4\n1\n", "line 3: .* has no acts"),
        ("1 2 4\n1\n1 1\n2\n", "line 4: labels without text"),
        ("1 2 5\n1\n1 1\n", "line 1: unknown label"),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(path, layout="dailydialog", acts=write(tmp_path, "bad.txt", text))


def test_platos_files(tmp_path):
    path = write(tmp_path, "dial.valid", "how are you ? __eou__ fine .\tgood .\n")
    assert pairs(read_prompts(path, layout="plato")) == [(f"how are you ?{END}fine .{END}", f"good .{END}")]
    with pytest.raises(DataError, match="line 1: not a prompt, a tab and a response"):
        read_prompts(write(tmp_path, "bad", "a b\n"), layout="plato")


def test_labelled_texts(tmp_path):
    yelp = write(tmp_path, "y.txt", "4\tgood food , i would say .\n0\tbad !\n")
    assert read_texts(yelp, layout="yelp") == [("good food, i would say.", "4"), ("bad!", "0")]
    table = write(
        tmp_path, "a.csv", '"Class Index","Title","Description"\n"3","A title","the news ."\n"1","B","more"\n'
    )
    assert read_texts(table, layout="agnews") == [("A title the news.", "business"), ("B more", "world")]
    assert read_texts(table, layout="agnews", parity="odd") == [("B more", "world")]
    lines = write(
        tmp_path, "a.jsonl", '{"text": "a", "label": 2}\n{"text": "b", "label": 0}\n{"text": "c", "label": 1}\n'
    )
    assert read_texts(lines, layout="agnews", parity="even", limit=2) == [("a", "2"), ("c", "1")]
    for name, layout, text, message in (
        ("y.txt", "yelp", "4\t \n", "line 1: a label without text"),
        ("y.txt", "yelp", "good\n", "line 1: no tab"),
        ("a.csv", "agnews", '"3"\n', "line 1: a label without text"),
        ("a.csv", "agnews", '"5","a"\n', "unknown label of agnews"),
        ("a.csv", "agnews", f'"{"9" * 5000}","a"\n', "unknown label of agnews"),
        ("a.csv", "agnews", '"\N{SUPERSCRIPT TWO}","a"\n', "unknown label of agnews"),
        ("a.jsonl", "agnews", '{"label": 3}\n', "line 1: a label without text"),
        ("a.jsonl", "agnews", "\n", "holds no text"),
    ):
        with pytest.raises(DataError, match=message):
            read_texts(write(tmp_path, name, text), layout=layout)


def test_options_that_contradict_the_layout(tmp_path):
    path = write(tmp_path, "p.jsonl", '{"prompt": "a", "response": "b"}\n')
    for options, message in (
        ({"layout": "yelp"}, "read_texts"),
        ({"acts": path}, "dailydialog"),
        ({"label_column": 2}, "tables"),
        ({"on_empty": "keep"}, "on_empty"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(path, **options)
    with pytest.raises(DataError, match="cannot tell the layout"):
        read_prompts(write(tmp_path, "p.txt", "a"))
    for options, message in (({"layout": "tsv"}, "layout of texts"), ({"layout": "yelp", "parity": "both"}, "parity")):
        with pytest.raises(DataError, match=message):
            read_texts(path, **options)


def test_the_real_dialogues(shared):
    path = shared / "data" / "dailydialog_valid.txt"
    dataset = read_prompts(path, layout="dailydialog")
    turns = sum(line.count("__eou__") for line in path.read_text(encoding="utf-8").splitlines())
    assert dataset.report.read == turns - 1000  # a dialogue's first utterance answers nothing
    assert dataset[0].prompt == f"Good morning, sir. Is there a bank near here?{END}"
    assert all(row.prompt.endswith(END) and row.response.endswith(END) for row in dataset)
    assert all(row.response.count(END) == 1 for row in dataset)


def test_the_real_reviews(shared):
    texts = read_texts(shared / "data" / "yelp_sentences_valid.txt", layout="yelp")
    assert len(texts) == 10_000 and {text.label for text in texts} == {"0", "1"}
    assert not any(" ." in text.text or text.text != text.text.strip() for text in texts)


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "|")])
def test_tables_with_other_delimiters(tmp_path, name, sign):
    path = tmp_path / name
    path.write_text(f"prompt{sign}response\nhello, you{sign}hi, you\nwhere?{sign}there\n")
    assert [(row.prompt, row.response) for row in read_prompts(path)] == [
        ("hello, you", "hi, you"),
        ("where?", "there"),
    ]
    assert len(read_prompts(path, delimiter=sign)) == 2
    with pytest.raises(DataError, match="belongs to tables"):
        read_prompts(path, layout="plato", delimiter=";")


def test_labels_that_are_none_and_labels_of_other_kinds(tmp_path):
    table = tmp_path / "a.tsv"
    table.write_text("prompt\tresponse\tkind\na\tb\t\nc\td\tx\n")
    assert read_prompts(table, label_column="kind").labels == [None, "x"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"prompt": "a", "responses": ["x", "y"], "labels": 3}\n')
    with pytest.raises(DataError, match="line 1: labels must be a list"):
        read_prompts(rows)
    with pytest.raises(DataError, match=r"a label must be a string; got: 0 \(int\)"):
        PromptResponse("a", "b", 0)


def test_a_plato_line_without_a_response_is_an_empty_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("hi there\t\nhi\thello\n")
    found = read_prompts(file, layout="plato", on_empty="drop")
    assert len(found) == 1 and found.report.dropped == {"empty response": 1}


def test_a_field_of_agnews_that_csv_cannot_take_is_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(f'1,"{"a" * 140_000}","b"\n')
    with pytest.raises(DataError, match="line 1: malformed csv"):
        read_texts(file, layout="agnews")
