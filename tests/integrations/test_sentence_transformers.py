"""Posterior means as sentence-transformers' embeddings: encoding, saving, evaluators, training's gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.testing import SENTENCES, make_model

st = pytest.importorskip("sentence_transformers")

from lmvae_fast.integrations.sentence_transformers import PosteriorMean  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


@pytest.fixture(scope="module")
def transformer(model):
    return st.SentenceTransformer(modules=[PosteriorMean(model)], device="cpu")


def test_embeddings_are_posterior_means(model, transformer):
    want = model.encode(SENTENCES).mu
    got = transformer.encode(list(SENTENCES), batch_size=3, convert_to_tensor=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert transformer.encode(SENTENCES[0]).shape == (6,) and transformer.get_embedding_dimension() == 6
    long = " ".join(SENTENCES)
    torch.testing.assert_close(torch.tensor(transformer.encode(long)), model.encode([long]).mu[0], rtol=1e-4, atol=1e-5)


def test_modules_may_follow(model):
    normalized = st.SentenceTransformer(
        modules=[PosteriorMean(model), st.sentence_transformer.modules.Normalize()], device="cpu"
    )
    assert np.linalg.norm(normalized.encode(list(SENTENCES[:3])), axis=1) == pytest.approx(1.0, abs=1e-5)


def test_saving_and_loading(transformer, tmp_path):
    transformer.save(str(tmp_path / "saved"))
    # The flag lets it import a class that is not its own, this package's; the folder holds no code.
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert not list((tmp_path / "saved").rglob("*.py"))
    assert isinstance(again[0], PosteriorMean)
    np.testing.assert_allclose(again.encode(list(SENTENCES)), transformer.encode(list(SENTENCES)), atol=1e-6)
    assert not list((tmp_path / "saved").rglob("*.bin")) and not list((tmp_path / "saved").rglob("*.pkl"))
    with pytest.raises(ConfigError, match="safetensors only"):
        transformer[0].save(str(tmp_path / "other"), safe_serialization=False)


def test_evaluators_of_sts_and_nli(model, transformer):
    from sentence_transformers.sentence_transformer.evaluation import (
        BinaryClassificationEvaluator,
        EmbeddingSimilarityEvaluator,
        TripletEvaluator,
    )

    one, two = list(SENTENCES[:6]), list(SENTENCES[2:8])
    mu, nu = model.encode(one).mu, model.encode(two).mu
    cosine = torch.nn.functional.cosine_similarity(mu, nu)
    result = EmbeddingSimilarityEvaluator(one, two, cosine.tolist(), name="sts")(transformer)
    assert result["sts_spearman_cosine"] == pytest.approx(1.0, abs=1e-6)
    labels = [int(c > cosine.median()) for c in cosine]
    result = BinaryClassificationEvaluator(one, two, labels, name="nli")(transformer)
    assert result["nli_cosine_accuracy"] == pytest.approx(1.0)
    result = TripletEvaluator(one, one, two, name="triplets")(transformer)
    assert result["triplets_cosine_accuracy"] == pytest.approx(1.0)


def test_gradients_reach_the_posterior_head(model):
    module = PosteriorMean(model)
    module(module.preprocess(list(SENTENCES[:2])))["sentence_embedding"].sum().backward()
    assert model.posterior_head.weight.grad[:6].abs().sum() > 0
    model.zero_grad()


def test_what_is_refused(model, transformer):
    with pytest.raises(ConfigError, match="sentences alone"):
        PosteriorMean(make_model(annotations=("a", "b")))
    with pytest.raises(ConfigError, match="sentences alone"):
        PosteriorMean(make_model("llama", system="cvae", queries=2))
    with pytest.raises(ConfigError, match=r"takes an LMVAE.*got.*PosteriorMean|PosteriorMean.*pass its"):
        PosteriorMean(PosteriorMean(model))
    with pytest.raises(DataError, match="empty"):
        transformer.encode(["a cat", " "])
    with pytest.raises(DataError, match="single sentences"):
        PosteriorMean(model).preprocess([("a", "b")])
    with pytest.raises(ConfigError, match="the model's own"):
        PosteriorMean(model).tokenizer = None
