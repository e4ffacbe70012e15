"""What is taken for rows by mistake: one text, a table's keys, a path."""

from __future__ import annotations

from pathlib import Path

import pytest

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
