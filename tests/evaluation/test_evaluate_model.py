"""evaluate() on whole (tiny) models: its figures are those of the model's own parts."""

import math

import pytest
import torch

from lmvae_fast.data import generate_corpus
from lmvae_fast.errors import DataError
from lmvae_fast.evaluation import bleu, evaluate
from lmvae_fast.testing import make_model


@pytest.mark.parametrize("system", ["langvae", "optimus"])
@torch.no_grad()
def test_figures_are_those_of_the_parts(system):
    model = make_model(system=system, max_len=24, slots=None)
    data = generate_corpus(12, seed=1)
    model.train()
    modes = [module.training for module in model.modules()]
    result = evaluate(model, data, batch_size=5, num_importance_samples=3, max_new_tokens=12)
    assert [module.training for module in model.modules()] == modes

    model.eval()
    sentences = model.tokenize(data)
    batch = model.make_batch(sentences)
    posterior = model.encode(batch)
    assert result.sentences == 12
    assert result.tokens == int(batch.tokens.sum()) == sum(sentences.lengths) + 12 - sentences.report["truncated"]
    assert result.kl == pytest.approx(float(posterior.kl().mean()), rel=1e-5)
    assert result.reconstruction_per_token == pytest.approx(result.reconstruction * 12 / result.tokens)
    assert result.elbo_perplexity == pytest.approx(math.exp(-result.elbo * 12 / result.tokens))
    decoded = [text.strip() for text in model.decode(posterior.mu, max_new_tokens=12)]
    assert [example["decoded"] for example in result.examples] == decoded[:10]
    assert result.bleu == pytest.approx(bleu(decoded, [text.strip() for text in sentences.texts]))
    assert result.dropped == sentences.report

    # The likelihood that evaluation uses is the one that training minimises.
    forward = model(batch, eps=torch.zeros_like(posterior.mu))
    torch.testing.assert_close(model.score(batch, posterior.mu), forward.reconstruction)


def test_importance_weighting_agrees_with_the_integral_over_a_line_of_latents():
    model = make_model(latent_dim=1, max_len=24).eval()
    # A random model's likelihood is so sharp in z that no posterior but the right one covers it; a gentler one.
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(0.05)
        # Off the prior in its mean, as wide as the prior: the weights matter and have no heavy tail.
        model.posterior_head.weight[0].mul_(12.0)
        model.posterior_head.weight[1] = 0.0
    sentences = model.tokenize(generate_corpus(4, seed=5))
    batch = model.make_batch(sentences)
    # log p(x) = log of the integral of p(x|z) N(z; 0, 1): a sum over a fine grid wide enough for the prior.
    grid = torch.linspace(-6.0, 6.0, 121)
    log_joint = [-model.score(batch, z.expand(4, 1)).double() - 0.5 * z.double() ** 2 for z in grid]
    step = float(grid[1] - grid[0])
    exact = torch.logsumexp(torch.stack(log_joint), 0) + math.log(step / math.sqrt(2 * math.pi))
    result = evaluate(model, sentences, num_importance_samples=1000, metrics=("elbo", "perplexity"))
    # Standard error of the mean of four sentences: sqrt((e^(mu^2) - 1) / 1000 / 4), about 0.03 at the means here.
    assert result.log_likelihood == pytest.approx(float(exact.mean()), abs=0.12)
    assert result.perplexity == pytest.approx(math.exp(-float(exact.sum()) / result.tokens), rel=0.006)
    # The ELBO is well outside of that.
    assert result.elbo < float(exact.mean()) - 0.4


@pytest.mark.parametrize("objective", ["elbo", "langvae-0.6"])
def test_batches_do_not_change_the_figures(objective):
    # With objective langvae-0.6 a batch is padded to its longest sentence, and the padding is predicted.
    model = make_model(max_len=48, objective=objective)
    assert len(set(model.tokenize(generate_corpus(9, seed=2)).lengths)) > 3
    texts = generate_corpus(9, seed=2).texts
    one, two = (
        evaluate(model, texts, batch_size=size, num_importance_samples=2, max_new_tokens=8).to_dict() for size in (2, 9)
    )
    for name, value in one.items():
        if name != "seconds":
            assert two[name] == (pytest.approx(value, rel=2e-5) if isinstance(value, float) else value), name


def test_pooled_features_give_the_same_figures():
    model = make_model(max_len=24)
    sentences = model.tokenize(generate_corpus(7, seed=3))
    without = evaluate(model, sentences, metrics=("elbo",))
    pooled = evaluate(model, sentences, metrics=("elbo",), pooled=model.pool(sentences))
    assert pooled.elbo == pytest.approx(without.elbo, rel=1e-5)


def test_a_conditional_model_is_evaluated_with_its_labels():
    data = generate_corpus(6, seed=4)
    model = make_model(max_len=24, annotations=data.label_set(), conditional_decoder=True)
    result = evaluate(model, data, metrics=("elbo", "bleu"), max_new_tokens=8)
    assert math.isfinite(result.elbo)
    with pytest.raises(DataError, match="no labels"):
        evaluate(model, data.texts, metrics=("elbo",))


def test_long_sentences_are_reported():
    model = make_model(max_len=9)
    data = generate_corpus(6, seed=4)
    result = evaluate(model, data, metrics=("elbo",))
    assert result.dropped["truncated"] > 0
    with pytest.raises(DataError):
        evaluate(model, data, metrics=("elbo",), on_long="error")
