"""LangVAE's datasets: rows, slices, labels, collation, caches on disk and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.integrations.langvae import TokenizedAnnotatedDataSet, TokenizedDataSet, collate_sparse_fn
from lmvae_fast.integrations.langvae.tokenization import token_ids
from lmvae_fast.testing import SENTENCES, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_a_row_is_one_hot(tokenizer):
    data = TokenizedDataSet(list(SENTENCES), tokenizer, 12)
    row = data[2]
    ids = tokenizer(SENTENCES[2])["input_ids"]
    assert list(row) == ["data", "input_ids", "attention_mask"] and row.data is row["data"] and row[0] is row.data
    assert row.data.shape == (1, len(ids), len(tokenizer.get_vocab())) and row.data.dtype == torch.int8
    assert row.data.is_sparse and row.data.to_dense().argmax(-1).tolist() == [ids]
    assert row.attention_mask.tolist() == [[1] * len(ids)]
    assert len(data) == len(SENTENCES) and torch.equal(data[-1].data.to_dense(), data[len(data) - 1].data.to_dense())
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_slice_is_padded_with_nothing(tokenizer):
    data = TokenizedDataSet(list(SENTENCES), tokenizer, 5)
    part = data[1:4]
    ids = [tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in SENTENCES[1:4]]
    assert token_ids(part.data, tokenizer.pad_token_id) == (ids, max(map(len, ids)))
    assert part.attention_mask.sum(1).tolist() == [len(row) for row in ids]
    collated = collate_sparse_fn([data[i] for i in (1, 2, 3)])
    assert torch.equal(collated.data.to_dense(), part.data.to_dense())
    assert torch.equal(collated.attention_mask, part.attention_mask)


def test_ids_instead_of_one_hot(tokenizer):
    data = TokenizedDataSet(list(SENTENCES), tokenizer, 12, one_hot=False)
    part = data[:3]
    assert part.data.dtype == torch.int64 and (part.data[~part.attention_mask.bool()] == tokenizer.pad_token_id).all()
    assert token_ids(part.data, tokenizer.pad_token_id)[0] == data.ids[:3]
    lists = TokenizedDataSet(list(SENTENCES), tokenizer, 12, one_hot=False, return_tensors=False)
    assert lists[:3].data == data.ids[:3]


def saf(text, roles):
    tokens = [
        SimpleNamespace(surface=word, annotations={} if role is None else {"srl": role})
        for word, role in zip(text.split(), roles, strict=True)
    ]
    return SimpleNamespace(surface=text, tokens=tokens, annotations={})


def test_saf_sentences_and_pairs_are_read_alike(tokenizer):
    texts, roles = ["a cat sleeps", "the sun is a star"], [["O", "A", "V"], ["O", "A", "V", "O", "P"]]
    kinds = {"srl": ["O", "A", "V", "P"]}
    objects = [saf(text, row) for text, row in zip(texts, roles, strict=True)]
    assert TokenizedDataSet(objects, tokenizer, 9).ids == TokenizedDataSet(texts, tokenizer, 9).ids
    pairs = TokenizedAnnotatedDataSet(([t.split() for t in texts], roles), tokenizer, 9, kinds)
    same = TokenizedAnnotatedDataSet(objects, tokenizer, 9, kinds)
    assert len(pairs) == len(same) == 2 and pairs.ids == same.ids
    for row in range(2):
        assert torch.equal(pairs[row].srl.to_dense(), same[row].srl.to_dense())
        labels = pairs[row].srl.to_dense()[0]
        assert [kinds["srl"][i] for i in labels.argmax(-1)[: len(roles[row])]] == roles[row]
        assert labels.sum(-1).tolist() == [1] * len(roles[row]) + [0] * (len(pairs.ids[row]) - len(roles[row]))
    batch = collate_sparse_fn([pairs[0], pairs[1]])
    assert batch.srl.shape == (2, max(map(len, pairs.ids)), 4)


def test_several_kinds_of_annotation_are_all_kept(tokenizer):
    item = saf("a cat", ["A", "V"])
    item.annotations = {"pos": ["x", "y"]}
    data = TokenizedAnnotatedDataSet([item], tokenizer, 9, {"srl": ["A", "V"], "pos": ["x", "y", "z"]})
    assert data[0].srl.shape[-1] == 2 and data[0].pos.shape[-1] == 3


def test_tokens_are_kept_on_disk(tokenizer, tmp_path):
    path = tmp_path / "deep" / "tokens.jsonl"
    options = dict(caching=True, cache_persistence=str(path))
    first = TokenizedDataSet(list(SENTENCES), tokenizer, 12, **options).ids
    size = path.stat().st_size
    calls = []
    again = TokenizedDataSet(list(SENTENCES), tokenizer, 12, **options)
    again._call = lambda texts: calls.append(texts) or []
    assert again.ids == first and not calls and path.stat().st_size == size
    # Another limit is another entry, and what was there stays.
    short = TokenizedDataSet([SENTENCES[0]], tokenizer, 3, **options)
    assert short.ids == [first[0][:3]] and path.stat().st_size > size
    assert TokenizedDataSet(list(SENTENCES), tokenizer, 12, **options).ids == first
    foreign = tmp_path / "thesis.txt"
    foreign.write_text("mine\n")
    with pytest.raises(DataError, match="no entry of a cache"):
        TokenizedDataSet(list(SENTENCES), tokenizer, 12, caching=True, cache_persistence=str(foreign)).ids  # noqa: B018
    assert foreign.read_text() == "mine\n"


def test_what_is_refused(tokenizer):
    kinds = {"srl": ["A"]}
    for call, error, message in (
        (lambda: TokenizedDataSet(["a"], tokenizer, 4, return_tensors=False), ConfigError, "one_hot=False"),
        (lambda: TokenizedDataSet(["a"], "gpt2", 4), ConfigError, "decoder.tokenizer"),
        (lambda: TokenizedDataSet([3], tokenizer, 4).ids, DataError, "row 0 is no sentence"),
        (lambda: TokenizedDataSet(["a", ""], tokenizer, 4).ids, DataError, "sentence 1 has no tokens"),
        (lambda: TokenizedAnnotatedDataSet(([["a"]], []), tokenizer, 4, kinds), DataError, "same length"),
        (lambda: TokenizedAnnotatedDataSet(([["a"]], [["A", "A"]]), tokenizer, 4, kinds)[0], DataError, "in number"),
        (lambda: TokenizedAnnotatedDataSet(([["a"]], [["B"]]), tokenizer, 4, kinds)[0], DataError, "unknown label"),
        (lambda: TokenizedAnnotatedDataSet(([["a"]], [["A"]]), tokenizer, 4, ["A"]), ConfigError, "kind"),
        (lambda: collate_sparse_fn([], collate_fn_map={}), ConfigError, "collate_fn_map"),
        (lambda: token_ids(torch.zeros(2, 3), 0), DataError, "tokens"),
    ):
        with pytest.raises(error, match=message):
            call()
