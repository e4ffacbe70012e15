"""Token losses of a prepared decoder piece by piece: the eager twin's, with every gradient, and when a batch stays whole."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from lmvae_fast.models import token_losses as module
from lmvae_fast.models.decoder.training_body import trained_through
from tests.models.cvae_cases import ITEMS, OTHERS, both, noise_for
from tests.models.test_cvae import compare_gradients


@pytest.fixture
def pieces(monkeypatch):
    """Batches are cut into pieces of a sentence or two; gives the sizes of those that the decoder has read."""
    read, whole = [], module.token_losses

    def noted(decoder, batch, *arguments):
        read.append(batch.batch_size)
        return whole(decoder, batch, *arguments)

    monkeypatch.setattr(module, "PIECE", 12)
    monkeypatch.setattr(module, "token_losses", noted)
    return read


@pytest.mark.parametrize(
    "offsets", [[0, 5], [0, 1, 2, 3], [0, 500, 501, 502, 1600], [0, 900, 901], list(range(0, 2000, 79))]
)
def test_pieces_are_whole_sentences_and_all_of_them(offsets):
    bounds = module.piece_bounds(offsets, 320)
    assert bounds[0] == 0
    assert bounds[-1] == len(offsets) - 1
    assert bounds == sorted(set(bounds))
    longest = max(b - a for a, b in itertools.pairwise(offsets))
    assert max(offsets[b] - offsets[a] for a, b in itertools.pairwise(bounds)) <= 2 * 320 + longest


SKIP = {"vae_type": "Vanilla", "gskip": 0, "skip": 1}
SETTINGS = [
    ("llama", {}), ("llama", SKIP), ("llama", {"vae_type": "EMB-DG-VAE"}), ("llama", {"vae_type": "BOW-VAE"}),
    ("gpt2", {}), ("gpt2", SKIP),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=str)
def test_loss_and_gradients_are_the_twins(tmp_path, pieces, family, settings):
    eager, model = both(tmp_path, family, **settings)
    noise = noise_for(eager.batch(ITEMS))
    want = eager.loss(eager.batch(ITEMS), noise)
    want.loss.backward()
    batch = model.make_batch(model.tokenize(ITEMS))
    with trained_through(model.decoder) as body:
        got = model(batch, eps=noise)
        assert body.runs == "prepared layers"
    assert len(pieces) > 1
    assert sum(pieces) == len(ITEMS)
    torch.testing.assert_close(got.reconstruction, want.nll, rtol=1e-4, atol=1e-4)
    assert abs(got.loss / want.loss - 1) < 1e-5
    assert not got.nll.requires_grad
    (3.0 * got.loss).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 3
    compare_gradients(model, eager)


@pytest.mark.parametrize("why", ["no run", "no gradient", "a part trains", "contrast"])
def test_other_batches_stay_whole(tmp_path, pieces, why):
    _, model = both(tmp_path)
    if why == "contrast":
        object.__setattr__(model.config, "contrast", True)
    model.decoder.head_weight.requires_grad_(why == "a part trains")
    batch = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    run = contextlib.nullcontext() if why == "no run" else trained_through(model.decoder)
    with run, torch.set_grad_enabled(why != "no gradient"):
        model(batch, seed=0)
    assert pieces in ([len(ITEMS) + len(OTHERS)], [])


def test_losses_do_not_depend_on_the_cut(tmp_path, pieces, monkeypatch):
    _, model = both(tmp_path)
    batch = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    found = []
    for piece in (12, 10**6):
        monkeypatch.setattr(module, "PIECE", piece)
        with trained_through(model.decoder):
            out = model(batch, seed=0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([out.loss, out.nll, *torch.autograd.grad(out.loss, trained, allow_unused=True)])
    assert len(pieces) > 3
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
