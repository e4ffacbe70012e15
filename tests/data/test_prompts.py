"""Prompts with responses: what is accepted, what is counted, and how a set is parted."""

from __future__ import annotations

import json

import pytest

from lmvae_fast.data import PromptDataset, PromptResponse, read_prompts
from lmvae_fast.errors import DataError, OutputError

ROWS = [
    {"prompt": "hello", "responses": ["hi", "good day"], "labels": ["inform", None]},
    {"prompt": "where?", "response": "there", "label": 3},
    PromptResponse("hello", "who is it?"),
    ("why?", "because"),
]


@pytest.fixture
def dataset():
    return PromptDataset.from_iterable(ROWS)


def test_rows_of_every_kind(dataset):
    assert len(dataset) == 5 and dataset.report.kept == dataset.report.read == 5
    assert dataset.prompts == ["hello", "where?", "why?"]
    assert dataset[0] == PromptResponse("hello", "hi", "inform")
    assert dataset.labels == ["inform", None, "3", None, None] and dataset.label_set() == ("3", "inform")
    assert [(prompt, [row.response for row in rows]) for prompt, rows in dataset.by_prompt()] == [
        ("hello", ["hi", "good day", "who is it?"]), ("where?", ["there"]), ("why?", ["because"])
    ]  # fmt: skip
    assert list(dataset[1:3]) == list(dataset)[1:3] and dataset.select([4])[0].prompt == "why?"


def test_empty_responses_are_counted_or_refused():
    rows = [{"prompt": "a", "responses": ["b", "  ", ""]}]
    dataset = PromptDataset.from_iterable(rows)
    assert len(dataset) == 1 and dataset.report.dropped == {"empty response": 2} and dataset.report.read == 3
    with pytest.raises(DataError, match=r"row 0: the response is empty"):
        PromptDataset.from_iterable(rows, on_empty="error")
    with pytest.raises(DataError, match="response is empty"):
        PromptResponse("a", " ")
    with pytest.raises(DataError, match="no response"):
        PromptDataset.from_iterable([{"prompt": "a", "responses": []}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "inform"}, "labels without text"),
        ({"prompt": "a"}, "not a prompt with its responses"),
        ({"prompt": "a", "response": "b", "responses": ["c"]}, "not a prompt with its responses"),
        ({"prompt": "a", "responses": "b"}, "responses must be a list"),
        ({"prompt": "a", "responses": ["b", "c"], "labels": ["x"]}, "1 labels; allowed: 2 responses"),
        ({"prompt": "a", "responses": ["b"], "labels": "x"}, "differ in number"),
        ({"prompt": 1, "response": "b"}, "prompt must be a string"),
        (("a", None), "response must be a string"),
        ("a", "not a prompt with a response"),
        (("a", "b", "c"), "not a prompt with a response"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        PromptDataset.from_iterable([("p", "r"), row])


def test_a_limit_counts_responses():
    dataset = PromptDataset.from_iterable(ROWS, limit=3)
    assert [row.response for row in dataset] == ["hi", "good day", "there"]
    assert dataset.report.stopped_at_limit


def test_a_split_keeps_prompts_whole():
    dataset = PromptDataset.from_iterable((f"p{i % 20}", f"r{i}") for i in range(100))
    train, held_out = dataset.split(held_out=0.25, seed=3)
    assert len(held_out.prompts) == 5 and len(train) + len(held_out) == 100
    assert not set(train.prompts) & set(held_out.prompts)
    assert [row.response for row in train] == [row.response for row in dataset if row.prompt in train.prompts]
    assert dataset.split(held_out=0.25, seed=3)[1] == held_out
    assert dataset.split(held_out=0.25, seed=4)[1] != held_out
    for share in (0, 1.0, 0.001):
        with pytest.raises(DataError):
            dataset.split(held_out=share)


def test_a_file_gives_the_dataset_back(dataset, tmp_path):
    path = tmp_path / "prompts.jsonl"
    dataset.write_jsonl(path)
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == dataset.prompts
    again = read_prompts(path)
    assert sorted(again, key=str) == sorted(dataset, key=str)
    assert again.fingerprint() != dataset.fingerprint()  # the order is another
    assert read_prompts(path).fingerprint() == again.fingerprint()
    with pytest.raises(OutputError):
        dataset.write_jsonl(tmp_path / "absent" / "prompts.jsonl")
