"""A whole small model on a CUDA device: losses, gradients and text as on the CPU; training steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.testing import make_model
from lmvae_fast.training.checkpoints import folder as checkpoint
from tests.training.helpers import plain_sentences, settings

from .common import capture, no_host_sync

pytestmark = pytest.mark.gpu

TEXTS = ["a cat is a kind of animal", "dogs eat meat", "water boils", "the sun is a star"]
MODELS = {
    "langvae": {},
    "prefix": {"visibility": "prefix", "slots": 4, "embedding_shift": True},
    "interleaved llama": {"family": "llama", "visibility": "interleaved"},
    "gemma2": {"family": "gemma2"},
    "optimus": {"system": "optimus"},
    "langvae as released": {"objective": "langvae-0.6", "free_running": True},
}


def build(name):
    model = make_model(**{"max_len": 12, **MODELS[name]}).eval()
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_text_are_the_cpus(name):
    model, device_model = build(name)
    batch = model.make_batch(model.tokenize(TEXTS))
    eps = torch.randn(4, 6)
    out = model(batch, beta=0.3, eps=eps)
    out.loss.backward()
    with lf.backend("auto"):
        ours = device_model(batch.to("cuda"), beta=0.3, eps=eps.cuda())
        ours.loss.backward()
    torch.testing.assert_close(ours.loss.cpu(), out.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.nll.cpu(), out.nll, rtol=1e-3, atol=1e-3)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients
    for key, p in device_model.named_parameters():
        assert (p.grad is not None) == (key in gradients), key
        if p.grad is not None:
            scale = gradients[key].abs().max().item()
            torch.testing.assert_close(
                p.grad.cpu(), gradients[key], rtol=1e-2, atol=1e-4 * scale + 1e-7, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert device_model.decode(ours.z.detach()) == model.decode(out.z.detach())


def test_encoding_and_scoring_are_the_cpus():
    model, device_model = build("langvae")
    ours, expected = device_model.encode(TEXTS), model.encode(TEXTS)
    torch.testing.assert_close(ours.mu.cpu(), expected.mu, rtol=1e-4, atol=1e-4)
    batch = model.make_batch(model.tokenize(TEXTS))
    score = device_model.score(batch.to("cuda"), ours.mu)
    torch.testing.assert_close(score.cpu(), model.score(batch, expected.mu), rtol=1e-3, atol=1e-3)


def test_a_training_pass_waits_for_nothing():
    _, model = build("langvae")
    sentences = model.tokenize(TEXTS)
    batch = model.make_batch(sentences, pooled=model.pool(sentences)).to("cuda")  # as in training: encoded beforehand
    model.train()
    for _ in range(2):
        model(batch, beta=1.0, seed=3).loss.backward()
    with no_host_sync():
        model(batch, beta=1.0, seed=4).loss.backward()


def test_a_training_pass_in_a_graph_draws_fresh_noise():
    _, model = build("langvae")
    sentences = model.tokenize(TEXTS)
    batch = model.make_batch(sentences, pooled=model.pool(sentences)).to("cuda")
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        out = model(batch, beta=1.0)
        return out.loss.detach(), out.z.detach(), torch.autograd.grad(out.loss, parameters)

    graph, (loss, z, gradients) = capture(step)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append((loss.clone(), z.clone()))
    assert not torch.equal(draws[0][1], draws[1][1])
    assert all(draw[0].isfinite() for draw in draws)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["langvae", "optimus"])
def test_training_learns_and_saves(tmp_path, name, precision):
    model = make_model(**{"max_len": 12, **MODELS[name]}).cuda()
    rate = 0.005 if name == "optimus" else 0.05
    config = settings(
        tmp_path, epochs=2, max_steps=14, log_every=7, precision=precision, beta_schedule="constant", beta=0.1,
        learning_rate=rate,
    )  # fmt: skip
    result = lf.train(model, plain_sentences(60), plain_sentences(20, seed=1), config)
    first, last = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert math.isfinite(last) and last < first
    assert result.step == 14
    stored = checkpoint.load(result.checkpoint).tensors["model"]
    trained = dict(model.named_parameters())
    assert stored and all(torch.equal(value.cpu(), trained[key].detach().cpu()) for key, value in stored.items())
    assert len(model.decode(torch.zeros(2, 6, device="cuda"))) == 2


@pytest.mark.parametrize("system", [{}, {"visibility": "prefix", "slots": 4}, {"system": "llamavae"}], ids=str)
def test_recorded_steps_train_as_launched_ones(system, tmp_path, caplog):
    def figures(cuda_graphs):
        torch.manual_seed(0)
        model = make_model("gpt2", max_len=12, projector_dropout=0.0, **system).cuda()
        for module in model.modules():  # whose draws would be those of a filled batch
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = lf.TrainConfig(
            output_dir=str(tmp_path / str(cuda_graphs)), max_steps=12, batch_size=4, log_every=1, tensorboard=False,
            progress=False, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        history = lf.train(model, TEXTS * 4, None, config).history
        return [[row[name] for name in ("loss", "kl", "grad_norm")] for row in history if row["kind"] == "train"]

    launched = figures(False)
    recorded = figures(True)
    assert "kernel by kernel" not in caplog.text
    torch.testing.assert_close(torch.tensor(recorded), torch.tensor(launched), rtol=2e-3, atol=1e-4)
