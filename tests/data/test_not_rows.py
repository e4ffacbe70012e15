"""What is taken for rows by mistake: one text, a table's keys, a path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import DataError

TEXTS = ["a cat", "a dog"]
MAKERS = [
    lf.SentenceDataset, lf.SentenceDataset.from_iterable, lf.PromptDataset, lf.PromptDataset.from_iterable
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rows", [{"text": TEXTS}, "a cat", b"a cat", Path("a.txt"), 3, None])
def test_what_is_no_rows_is_refused_with_what_reads_it(make, rows):
    with pytest.raises(DataError, match=r"takes rows.*(read|iterable)"):
        make(rows)


@pytest.mark.parametrize("make", MAKERS)
def test_a_data_frame_is_no_rows(make):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match=r"table.*lf\.read"):
        make(pandas.DataFrame({"text": TEXTS}))


def test_rows_that_are_mappings_are_taken():
    assert lf.SentenceDataset.from_iterable({"text": text} for text in TEXTS).texts == TEXTS
    assert lf.SentenceDataset(TEXTS).texts == TEXTS
    with pytest.raises(DataError, match="rows that are mappings"):
        lf.testing.make_model().tokenize([{"text": "a cat"}])


@pytest.mark.parametrize("reader", [lf.read, lf.read_prompts])
@pytest.mark.parametrize("value", [TEXTS, 3, None, iter(TEXTS)])
def test_readers_say_what_they_take(reader, value):
    with pytest.raises(DataError, match=r"takes the path of a file.*from_iterable"):
        reader(value)


def test_a_series_is_no_path():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="from_iterable"):
        lf.read(pandas.Series(TEXTS))


def test_prompts_are_read_from_tables():
    table = {"prompt": ["why?", "where?"], "response": ["because", "there"], "label": ["x", None]}
    found = lf.read_prompts(table)
    assert [(row.prompt, row.response, row.label) for row in found] == [
        ("why?", "because", "x"),
        ("where?", "there", None),
    ]
    assert lf.read_prompts({"a": ["why?"], "b": ["because"]}, columns=("a", "b")).responses == ["because"]
    assert lf.read_prompts({"prompt": ["why?"], "responses": [["so", "because"]]}).responses == ["so", "because"]
    for options, message in (
        ({"layout": "csv"}, "no layout"),
        ({"columns": (0, 1)}, "names"),
        ({"columns": ("a", "b")}, "no column 'a'"),
    ):
        with pytest.raises(DataError, match=message):
            lf.read_prompts(table, **options)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["why?"], "response": ["because"]})
    assert lf.read_prompts(frame).responses == ["because"]
    with pytest.raises(DataError, match="table"):
        lf.testing.make_model("gpt2", system="cvae", latent_dim=8, max_len=24).tokenize(frame)


def test_a_path_is_no_sentences():
    model = lf.testing.make_model()
    for call in (model.tokenize, model.encode, lambda data: lf.evaluate(model, data, metrics=("elbo",))):
        for value in (Path("a.txt"), 3, None):
            with pytest.raises(DataError, match=r"lf\.read"):
                call(value)


@pytest.mark.parametrize("options", [{}, {"system": "cvae", "latent_dim": 8, "max_len": 24}])
def test_half_a_character_in_a_prompt_is_named_by_its_row(options):
    model = lf.testing.make_model("gpt2", **options)
    with pytest.raises(DataError, match="prompt 1"):
        model.decode(torch.zeros(3, model.config.latent_dim), prompts=["a", "b\ud83d", "c"])
