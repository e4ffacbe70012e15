"""The dataset: columns, checks, reports, splits and fingerprints."""

import json

import pytest

from lmvae_fast.data import Example, SentenceDataset, read
from lmvae_fast.errors import DataError, OutputError

ROWS = [
    "a cat is an animal",
    Example("ice melts", ("ARG1", "V"), {"topic": "matter"}),
    {"text": "rain falls", "labels": ["ARG1", "V"], "factors": {"topic": "weather"}},
    {"text": "dogs run", "labels": "ARG0 V"},
]


def test_iterables_of_every_kind_become_columns():
    data = SentenceDataset.from_iterable(iter(ROWS))
    assert data.texts == ["a cat is an animal", "ice melts", "rain falls", "dogs run"]
    assert data.labels == [None, ("ARG1", "V"), ("ARG1", "V"), ("ARG0", "V")]
    assert data.factors == [None, {"topic": "matter"}, {"topic": "weather"}, None]
    assert data[1] == Example("ice melts", ("ARG1", "V"), {"topic": "matter"})
    assert data[-1].text == "dogs run"
    assert [example.text for example in data] == data.texts
    assert data.label_set() == ("ARG0", "ARG1", "V")
    assert data.factor_values() == {"topic": ("matter", "weather")}
    assert len(data[1:3]) == 2
    assert data[1:3] == data.select([1, 2])
    assert data[::-1].texts == data.texts[::-1]
    with pytest.raises(IndexError):
        data[4]


def test_plain_sentences_have_no_label_columns():
    data = SentenceDataset.from_iterable(["one", "two"])
    assert data.labels is None
    assert data.factors is None
    assert data.label_set() == ()
    assert data.factor_values() == {}
    assert data[0] == Example("one")


def test_empty_sentences_are_dropped_and_counted_or_refused():
    rows = ["one", "", "  \t ", "two", Example("three")]
    data = SentenceDataset.from_iterable(rows)
    assert data.texts == ["one", "two", "three"]
    assert data.report.to_dict() == {
        "source": "iterable", "format": None, "read": 5, "kept": 3, "dropped": {"empty": 2},
        "places": {"empty": ["row 1", "row 2"]}, "stopped_at_limit": False,
    }  # fmt: skip
    assert "3 of 5 rows kept; dropped: 2 empty" in str(data.report)
    with pytest.raises(DataError, match=r"row 1.*empty"):
        SentenceDataset.from_iterable(rows, on_empty="error")
    with pytest.raises(DataError, match="empty"):
        Example(" ")


@pytest.mark.parametrize("rows", [[], ["", " "]])
def test_a_dataset_without_sentences_is_an_error(rows):
    with pytest.raises(DataError, match="dataset is empty"):
        SentenceDataset.from_iterable(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "row 0 is no sentence.*int"),
        ({"sentence": "x"}, "row 0 has no 'text'.*sentence"),
        ({"text": 3}, "not a string"),
        ({"text": "two words", "labels": ["V"]}, "row 0.*1 labels.*2 labels"),
        ({"text": "two words", "labels": ["V", 3]}, "labels are not"),
        ({"text": "two words", "factors": {"topic": 3}}, "factors are not"),
        ({"text": "two words", "factors": "topic"}, "factors are not"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        SentenceDataset.from_iterable([row])


def test_limit_reads_no_further():
    rows = iter(["one", "", "two", "three"])
    data = SentenceDataset.from_iterable(rows, limit=2)
    assert data.texts == ["one", "two"]
    assert data.report.stopped_at_limit
    assert next(rows) == "three"
    for limit in (0, -1, 1.5, True):
        with pytest.raises(DataError, match="limit"):
            SentenceDataset.from_iterable(["one"], limit=limit)


def test_line_breaks_inside_a_sentence_become_spaces():
    assert SentenceDataset.from_iterable([" a\nb\r\nc "]).texts == ["a b  c"]


def test_split_is_disjoint_complete_and_the_same_everywhere():
    data = SentenceDataset.from_iterable([f"sentence {i}" for i in range(20)])
    train, held_out = data.split(held_out=0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(train.texts + held_out.texts) == sorted(data.texts)
    assert not set(train.texts) & set(held_out.texts)
    # Recorded: it must not change with the Python version or the process's hash seed.
    assert held_out.texts == ["sentence 1", "sentence 5", "sentence 8", "sentence 12", "sentence 13"]
    assert data.split(held_out=0.25, seed=4)[1].texts != held_out.texts


def test_split_keeps_equal_sentences_together():
    data = SentenceDataset.from_iterable(["a", "b", "a", "c", "a", "d"] * 3)
    for seed in range(8):
        train, held_out = data.split(held_out=0.5, seed=seed)
        assert len(set(train.texts)) == len(set(held_out.texts)) == 2
        assert not set(train.texts) & set(held_out.texts)
        assert len(train) + len(held_out) == len(data)


def test_split_refuses_what_would_leave_a_part_empty():
    data = SentenceDataset.from_iterable(["a", "b"])
    for fraction in (0.0, 1.0, -0.1, 2, float("nan")):
        with pytest.raises(DataError, match="held_out"):
            data.split(held_out=fraction)
    with pytest.raises(DataError, match="empty"):
        data.split(held_out=0.1)
    with pytest.raises(DataError, match="seed"):
        data.split(held_out=0.5, seed=-1)


def test_filter_length_counts_what_it_drops():
    data = SentenceDataset.from_iterable(["", "a", "a b", "a b c", "a b c d", "b c"])
    part = data.filter_length(2, 3)
    assert part.texts == ["a b", "a b c", "b c"]
    assert part.report.dropped == {"empty": 1, "shorter than 2 words": 1, "longer than 3 words": 1}
    assert part.report.read == part.report.kept + sum(part.report.dropped.values()) == 6
    assert data.report.dropped == {"empty": 1}
    with pytest.raises(DataError, match="no sentence"):
        data.filter_length(9)
    with pytest.raises(DataError, match="contradict"):
        data.filter_length(3, 2)


def test_fingerprint_is_of_the_content_alone():
    base = SentenceDataset.from_iterable(ROWS)
    assert base.fingerprint() == SentenceDataset.from_iterable(iter(ROWS)).fingerprint()
    # Recorded: a cache made on another machine must be found again.
    assert SentenceDataset.from_iterable(["a", "b"]).fingerprint().startswith("03c2c8b8e644805c")
    others = [
        base[:3],
        base[::-1],
        SentenceDataset(base.texts, None, base.factors),
        SentenceDataset(base.texts, base.labels),
        SentenceDataset(["a cat is an animal ice melts", *base.texts[2:]]),
        SentenceDataset(["a cat is an animal", "ice", "melts", *base.texts[2:]]),
    ]
    prints = {data.fingerprint() for data in [base, *others]}
    assert len(prints) == 1 + len(others)


def test_jsonl_round_trip(tmp_path):
    data = SentenceDataset.from_iterable([*ROWS, "grüße & más"])
    data.write_jsonl(tmp_path / "data.jsonl")
    again = read(tmp_path / "data.jsonl")
    assert again == data
    assert again.fingerprint() == data.fingerprint()
    assert json.loads((tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()[0]) == {
        "text": "a cat is an animal"
    }
    with pytest.raises(OutputError, match="nowhere"):
        data.write_jsonl(tmp_path / "nowhere" / "data.jsonl")


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="labels and texts"):
        SentenceDataset(["a", "b"], [("V",)])
