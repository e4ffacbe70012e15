"""The cache of tokens and pooled features: computed once, keyed by content, mended when damaged."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lmvae_fast.files import fingerprint_tensors, temporary_beside, write_tensors
from lmvae_fast.training.callbacks import read_records
from lmvae_fast.training.feature_cache import (
    TensorCache,
    content_key,
    encoder_fingerprint,
    pooled_features,
    tokenized_sentences,
)
from tests.training.fake_model import VOCABULARY, FakeModel, sentences


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def pooled(model, cache, texts=None):
    tokenized = tokenized_sentences(model, texts or sentences(20), cache, on_long="truncate")
    return pooled_features(model, tokenized, encoder_fingerprint(model), cache, batch_size=8)


def test_pooled_once(cache):
    first, second = FakeModel(), FakeModel()
    expected = pooled(first, cache)
    found = pooled(second, cache)
    assert (first.pool_calls, second.pool_calls) == (1, 0)
    assert torch.equal(expected, found)
    assert torch.equal(found, second.pool(second.tokenize(sentences(20))))


def test_what_a_killed_process_left_goes_even_if_its_entry_is_never_asked_for_again(cache):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    pooled(FakeModel(), cache)
    whole = sorted(cache.folder.iterdir())
    half = temporary_beside(cache.path("tokens", "of other sentences"))
    half.with_name(half.name.replace(f"-{os.getpid()}-", f"-{child.pid}-")).write_bytes(b"cut short")
    pooled(FakeModel(), cache)
    assert sorted(cache.folder.iterdir()) == whole


def test_keyed_by_content(cache):
    model = FakeModel()
    pooled(model, cache)
    other = FakeModel(encoder_seed=1)
    pooled(other, cache)
    assert other.pool_calls == 1, "another encoder's features were used"
    pooled(model, cache, [*sentences(19), "something else"])
    assert model.pool_calls == 2, "another text's features were used"
    trained = FakeModel(train_encoder=True)
    assert pooled(trained, cache) is None


def test_what_trains_is_not_part_of_the_key(cache):
    model = FakeModel()
    pooled(model, cache)
    with torch.no_grad():
        model.output.weight.add_(1)
    pooled(model, cache)
    assert model.pool_calls == 1


DAMAGE = {
    "flipped bit": lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    "truncated": lambda p: os.truncate(p, p.stat().st_size - 9),
    "emptied": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("not safetensors at all"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_mended_with_a_warning(cache, damage):
    model = FakeModel()
    expected = pooled(model, cache).clone()
    (entry,) = cache.folder.glob("pooled-*")
    DAMAGE[damage](entry)
    with pytest.warns(UserWarning, match="unusable and is computed again"):
        assert torch.equal(pooled(model, cache), expected)
    pooled(model, cache)
    assert model.pool_calls == 2
    assert not list(cache.folder.glob(".tmp*"))


def _tokens(**changes):
    """A change of the tokens' fields, which their JSON in bytes holds."""

    def change(tensors):
        text = json.loads(tensors["json"].numpy().tobytes())
        for name, value in changes.items():
            text[name] = value(text[name])
        tensors["json"] = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)

    return change


IMPOSSIBLE = {
    "ids outside": ("tokens", _tokens(ids=lambda ids: [[VOCABULARY], *ids[1:]]), "outside a vocabulary"),
    "negative ids": ("tokens", _tokens(ids=lambda ids: [[-1], *ids[1:]]), "outside a vocabulary"),
    "no ids": ("tokens", _tokens(ids=lambda ids: [[], *ids[1:]]), "ids"),
    "ids that are none": ("tokens", _tokens(ids=lambda ids: [["x"], *ids[1:]]), "ids"),
    "too many ids": ("tokens", _tokens(ids=lambda ids: [[1] * 9, *ids[1:]]), "1 to 8 ids"),
    "a sentence less": ("tokens", _tokens(ids=lambda ids: ids[1:]), "different lengths"),
    "texts that are none": ("tokens", _tokens(texts=lambda texts: [1, *texts[1:]]), "texts are none"),
    "no fields": ("tokens", lambda tensors: tensors.update(json=torch.frombuffer(bytearray(b"[]"), dtype=torch.uint8)), ""),
    "a row less": ("pooled", lambda tensors: tensors.update(pooled=tensors["pooled"][1:].clone()), "it holds"),
    "another width": ("pooled", lambda tensors: tensors.update(pooled=tensors["pooled"][:, 1:].contiguous()), "it holds"),
    "NaN": ("pooled", lambda tensors: tensors["pooled"].view(-1)[3:4].fill_(float("nan")), "finite"),
    "integers": ("pooled", lambda tensors: tensors.update(pooled=tensors["pooled"].long()), "finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_entry_that_fits_its_hash_and_cannot_be(cache, name):
    """Whoever can write an entry can write its hash: what it holds is looked at, too."""
    kind, change, message = IMPOSSIBLE[name]
    expected = pooled(FakeModel(), cache).clone()
    (entry,) = cache.folder.glob(f"{kind}-*")
    with safe_open(entry, "pt") as file:
        key = file.metadata()["key"]
    tensors = load_file(entry)
    change(tensors)
    write_tensors(entry, tensors, {"key": key, "sha256": fingerprint_tensors(tensors)})
    with pytest.warns(UserWarning, match=f"unusable and is computed again.*{message}"):
        assert torch.equal(pooled(FakeModel(), cache), expected)


def test_an_entry_that_would_fill_its_disk_is_not_written(cache, monkeypatch):
    monkeypatch.setattr("lmvae_fast.training.feature_cache.free_disk", lambda path: 11)
    with pytest.warns(UserWarning, match="not cached.*cache_dir"):
        assert cache.get("x", "key", lambda: {"v": torch.ones(3)})["v"].sum() == 3
    assert not cache.folder.exists()
    monkeypatch.setattr("lmvae_fast.training.feature_cache.free_disk", lambda path: 12)
    cache.get("x", "key", lambda: {"v": torch.ones(3)})
    assert cache.path("x", "key").is_file()


@pytest.mark.parametrize(
    "line",
    ['{"kind": "train", "step": 2', "[]", '{"kind": "train"}', '{"kind": "train", "step": "2"}',
     '{"kind": "train", "step": true}', '{"kind": "train", "step": -1}', '{"kind": "x", "step": 2}',
     '{"kind": "train", "step": 2, "loss": [1]}', '{"kind": "train", "step": 2, "step": 3}', "[" * 5000],
    ids=lambda line: line[:45],
)  # fmt: skip
def test_records_end_where_they_are_none(tmp_path, line):
    path, whole = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 1, "elbo": -3.5}\n'
    path.write_text(whole + line + "\n" + whole)
    assert read_records(path) == [{"kind": "train", "step": 1, "elbo": -3.5}]


def test_an_entry_of_another_key_is_not_used(cache):
    one = cache.get("x", content_key(a=1), lambda: {"v": torch.ones(3)})
    os.rename(cache.path("x", content_key(a=1)), cache.path("x", content_key(a=2)))
    with pytest.warns(UserWarning, match="another key"):
        two = cache.get("x", content_key(a=2), lambda: {"v": torch.zeros(3)})
    assert (one["v"].tolist(), two["v"].tolist()) == ([1, 1, 1], [0, 0, 0])


def test_a_cache_that_cannot_be_written_is_said_and_survived(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert cache.get("x", "key", lambda: {"v": torch.ones(3)})["v"].sum() == 3


def test_a_computation_that_fails_leaves_nothing(cache):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        cache.get("x", "key", fail)
    assert not cache.folder.exists() or not list(cache.folder.iterdir())


def test_tokens_round_trip(cache):
    """Every field comes back as it was, also from the file, with accents, quotes and annotations."""
    import dataclasses

    model = FakeModel()
    tokenize, calls = model.tokenize, []

    def annotated(examples, on_long="truncate"):
        calls.append(on_long)
        result = tokenize(list(examples), on_long)
        return dataclasses.replace(result, annotations=torch.rand(len(result), 3, generator=torch.manual_seed(1)))

    model.tokenize = annotated
    texts = ["naïve café", 'a "quoted" 雪', "x", "one two three four five six seven eight nine"]
    first = tokenized_sentences(model, texts, cache, on_long="truncate")
    second = tokenized_sentences(model, texts, cache, on_long="truncate")
    assert calls == ["truncate"]
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name
    assert first.fingerprint() == second.fingerprint() == annotated(texts).fingerprint()
    assert len(tokenized_sentences(model, texts, cache, on_long="drop")) == 3
    assert len(calls) == 3


def test_what_is_tokenised_passes_through_and_iterators_are_read_once(cache):
    model = FakeModel()
    tokenized = model.tokenize(sentences(3))
    assert tokenized_sentences(model, tokenized, cache, on_long="truncate") is tokenized
    assert len(tokenized_sentences(model, iter(sentences(3)), cache, on_long="truncate")) == 3


def test_read_features_are_memory_mapped(cache):
    """Reading does not load: the resident set grows far less than the 64 MB file, until pages are used."""
    cache.get("big", "key", lambda: {"v": torch.zeros(16, 1 << 20)})
    tensors = cache.get("big", "key", lambda: pytest.fail("not cached"))
    with open("/proc/self/smaps") as maps:
        assert "big-key.safetensors" in maps.read()
    assert tensors["v"].shape == (16, 1 << 20)
