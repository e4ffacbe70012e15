"""evaluate() on a model whose every figure is known in closed form."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lmvae_fast.data import SentenceDataset
from lmvae_fast.errors import ConfigError, DataError, NumericalError
from lmvae_fast.evaluation import EvaluationResult, bleu, evaluate, metrics
from lmvae_fast.models.posterior import Posterior

TEXTS = ["0.5 -1.0", "2.0 0.25", "-0.75 1.5", "1.0 1.0", "-2.0 0.0"]


@dataclass
class Sentences:
    texts: list
    ids: list
    report: dict = field(default_factory=lambda: {"kept": 5, "truncated": 0, "dropped": 0, "empty": 0})

    def __len__(self):
        return len(self.texts)


class LinearGaussian(nn.Module):
    """A "sentence" is a point x of the plane; p(x|z) = N(x; 2z, I), and the posterior is exact: N(0.4 x, 0.2 I)."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.frozen = nn.Dropout(0.5)
        self.config = SimpleNamespace(conditional_decoder=False)
        self.shift, self.states, self.decoded_with = shift, [], None

    def tokenize(self, examples, on_long="truncate"):
        texts = [getattr(example, "text", example) for example in examples]
        return Sentences(texts, [[1, 2]] * len(texts))

    def make_batch(self, sentences, rows, pooled=None):
        x = torch.tensor([[float(word) for word in sentences.texts[row].split()] for row in rows], dtype=torch.float64)
        batch = SimpleNamespace(
            x=x if pooled is None else pooled[list(rows)], tokens=torch.full((len(rows),), 3), prompt_ids=None
        )
        batch.to = lambda device: batch
        return batch

    def encode(self, batch):
        self.states.append((self.training, torch.is_grad_enabled()))
        mu = 0.4 * batch.x + self.shift
        return Posterior(mu, torch.full_like(mu, math.log(0.2)))

    def score(self, batch, z):
        return -metrics.gaussian_log_density(batch.x, self.scale * z, torch.zeros_like(z))

    def decode(self, z, **options):
        self.decoded_with = options
        # The posterior mean, un-shrunk: the sentence itself, but for the first number's sign when it is negative.
        return [f" {abs(a)} {b}" for a, b in (z / 0.4).round(decimals=4).tolist()]


def _exact():
    x = torch.tensor([[float(word) for word in text.split()] for text in TEXTS], dtype=torch.float64)
    return metrics.gaussian_log_density(x, torch.zeros_like(x), torch.full_like(x, math.log(5.0)))


def test_likelihoods_of_an_exact_posterior():
    result = evaluate(LinearGaussian(), TEXTS, batch_size=2, num_importance_samples=3)
    exact = _exact()
    # The posterior is exact, so importance weighting has no variance at any K.
    assert result.log_likelihood == pytest.approx(float(exact.mean()), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(-float(exact.sum()) / 15), rel=1e-6)
    mu = torch.tensor([[float(word) for word in text.split()] for text in TEXTS]) * 0.4
    kl = metrics.kl_divergence(mu, torch.full_like(mu, math.log(0.2)))
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert result.elbo == pytest.approx(-(result.reconstruction + result.kl))
    assert result.reconstruction_per_token == pytest.approx(result.reconstruction / 3)
    assert result.elbo_perplexity == pytest.approx(math.exp(-result.elbo / 3))
    assert result.active_units == 2
    assert 0.0 < result.mutual_information <= math.log(5) + 1e-9
    assert (result.sentences, result.tokens, result.latent_dim, result.num_importance_samples) == (5, 15, 2, 3)


def test_elbo_is_the_mean_of_what_its_sample_estimates():
    # E_q[-log p(x|z)] for z ~ N(m, 0.2 I) is log(2 pi) + (|x - 2m|^2 + 4 * 0.2 * 2) / 2 in the plane.
    model = LinearGaussian()
    x = torch.tensor([[float(word) for word in text.split()] for text in TEXTS])
    expected = float((math.log(2 * math.pi) + 0.5 * ((0.2 * x).square().sum(-1) + 1.6)).mean())
    many = evaluate(model, TEXTS * 400, batch_size=500, metrics=("elbo",))
    assert many.reconstruction == pytest.approx(expected, abs=0.06)  # 2000 draws with standard deviation 1


def test_text_figures_come_from_the_posterior_mean():
    model = LinearGaussian()
    result = evaluate(model, TEXTS, batch_size=2, metrics=("bleu", "exact_match", "token_accuracy"), max_new_tokens=7)
    assert result.exact_match == pytest.approx(3 / 5)  # two sentences begin with a negative number
    assert result.token_accuracy == pytest.approx(8 / 10)
    # sacrebleu itself, on what should have been decoded: five pairs of numbers, so no 4-gram and a score of 0 ...
    assert result.bleu == 0.0
    # ... and with sentences long enough, the figure of the corpus.
    long = ["1.0 2.0 3.0 4.0 5.0", "2.0 1.0 0.5 0.25 1.5"]
    model.decode = lambda z, **options: ["1.0 2.0 3.0 4.0 5.0", "2.0 1.0 0.5 0.25 9.5"]
    assert evaluate(model, long, metrics=("bleu",)).bleu == pytest.approx(bleu(model.decode(None), long))
    model = LinearGaussian()
    result = evaluate(model, TEXTS, batch_size=2, metrics=("exact_match",), max_new_tokens=7)
    assert model.decoded_with == {"batch_size": 1, "max_new_tokens": 7}
    assert result.examples[0] == {"text": "0.5 -1.0", "decoded": "0.5 -1.0"}
    assert result.examples[2] == {"text": "-0.75 1.5", "decoded": "0.75 1.5"}
    assert result.elbo is None
    assert set(result.to_dict()) >= {"exact_match", "sentences", "dropped", "seconds", "examples"}
    assert not set(result.to_dict()) & {"elbo", "perplexity", "kl", "bleu", "num_importance_samples"}


def test_a_shifted_posterior_has_a_worse_elbo_but_the_same_perplexity_in_the_limit():
    good = evaluate(LinearGaussian(), TEXTS * 40, batch_size=200, metrics=("elbo",))
    bad = evaluate(LinearGaussian(0.5), TEXTS * 40, num_importance_samples=500, metrics=("elbo", "perplexity"))
    assert bad.elbo < good.elbo - 0.5
    assert bad.log_likelihood == pytest.approx(float(_exact().mean()), abs=0.05)


def test_figures_do_not_depend_on_the_batch_size_and_leave_torch_generator_alone():
    before = torch.get_rng_state()
    one, all_at_once = (
        evaluate(LinearGaussian(0.1), TEXTS, batch_size=size, num_importance_samples=4).to_dict() for size in (1, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.items():
        if name != "seconds":
            assert all_at_once[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
    other = evaluate(LinearGaussian(0.1), TEXTS, num_importance_samples=4, seed=1)
    assert other.elbo != one["elbo"]
    # Nor does the ELBO depend on which other figures are asked for.
    assert evaluate(LinearGaussian(0.1), TEXTS, metrics=("elbo",)).elbo == pytest.approx(one["elbo"], rel=1e-12)


def test_modes_are_restored_and_no_graph_is_built():
    model = LinearGaussian()
    model.train()
    model.frozen.eval()
    evaluate(model, TEXTS, metrics=("elbo",))
    assert model.states == [(False, False)]
    assert model.training
    assert not model.frozen.training
    assert torch.is_grad_enabled()
    model.encode = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, TEXTS, metrics=("elbo",))
    assert model.training


def test_datasets_tokenised_sentences_and_pooled_features_are_accepted():
    model = LinearGaussian()
    expected = evaluate(model, TEXTS, metrics=("elbo",)).elbo
    assert evaluate(model, SentenceDataset.from_iterable(TEXTS), metrics=("elbo",)).elbo == expected
    assert evaluate(model, model.tokenize(TEXTS), metrics=("elbo",)).elbo == expected
    pooled = torch.zeros(5, 2, dtype=torch.float64)
    assert evaluate(model, TEXTS, metrics=("elbo",), pooled=pooled).elbo != expected


def test_annotations_reach_the_decoder_of_a_conditional_model():
    model = LinearGaussian()
    model.config.conditional_decoder = True
    make_batch = model.make_batch

    def annotated(sentences, rows, pooled=None):
        batch = make_batch(sentences, rows, pooled)
        batch.annotations = torch.tensor([[float(row)] for row in rows])
        return batch

    model.make_batch = annotated
    evaluate(model, TEXTS, batch_size=4, metrics=("bleu",))
    assert model.decoded_with["annotations"].tolist() == [[4.0]]


def test_bad_requests():
    model = LinearGaussian()
    with pytest.raises(ConfigError, match=r"'rouge'.*elbo"):
        evaluate(model, TEXTS, metrics=("elbo", "rouge"))
    with pytest.raises(ConfigError, match="sequence"):
        evaluate(model, TEXTS, metrics="bleu")
    with pytest.raises(ConfigError, match="sequence"):
        evaluate(model, TEXTS, metrics=())
    for option in ("batch_size", "num_importance_samples"):
        with pytest.raises(ConfigError, match=option):
            evaluate(model, TEXTS, **{option: 0})
    with pytest.raises(ConfigError, match="seed"):
        evaluate(model, TEXTS, seed=-1)
    with pytest.raises(DataError, match="too few"):
        evaluate(model, TEXTS[:1], metrics=("active_units",))
    assert isinstance(evaluate(model, TEXTS[:1], metrics=("elbo",)), EvaluationResult)


def test_a_figure_that_is_not_finite_stops_the_evaluation():
    model = LinearGaussian()
    with torch.no_grad():
        model.scale.fill_(math.nan)
    with pytest.raises(NumericalError, match="reconstruction"):
        evaluate(model, TEXTS, metrics=("elbo",))
