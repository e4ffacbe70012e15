"""The cache of tokens and pooled features: computed once, keyed by content, mended when damaged."""

import os

import pytest
import torch

from lmvae_fast.training.feature_cache import (
    TensorCache,
    content_key,
    encoder_fingerprint,
    pooled_features,
    tokenized_sentences,
)
from tests.training.fake_model import FakeModel, sentences


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
