"""Costs counted on the meta device, against torch's own counter on a real step, and against published figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.data import generate_corpus
from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES, visibility_mask
from lmvae_fast.profiling.cost import FORMULAS, Cost, attention_pairs
from lmvae_fast.profiling.counts import RECIPES, SavedBytes, StepShape, count_pair
from lmvae_fast.profiling.presets import DECODERS, build_decoder, build_encoder, preset_config, random_model

BATCH, LATENT, MAX_LEN = 4, 8, 16


def step(system):
    """(model, one batch of sentences of one length) of a tiny random model."""
    texts = generate_corpus(200, seed=0).texts
    config = LMVAEConfig(
        system=system, latent_dim=LATENT, max_len=MAX_LEN, projector_dropout=0.0, dtype="float32",
        pooling="mean" if system == "langvae" else None,
    )  # fmt: skip
    model = random_model("tiny", "tiny", config, texts).train()
    sentences = model.tokenize(texts)
    longest = max(sentences.lengths)
    rows = [row for row, length in enumerate(sentences.lengths) if length == longest][:BATCH]
    pooled = model.pool(sentences) if system == "langvae" else None
    return model, model.make_batch(sentences, rows, pooled)


def counted(system, tokens):
    shape = StepShape(batch=BATCH, tokens=tokens, latent_dim=LATENT, max_len=MAX_LEN)
    return count_pair(build_encoder("tiny"), build_decoder("tiny"), shape, RECIPES[system])


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_a_real_step_has_the_flops_counted_without_running_it(system):
    model, batch = step(system)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(batch, beta=1.0).loss.backward()
    with Cost() as cost:
        model(batch, beta=1.0).loss.backward()
    expected = counted(system, batch.max_seqlen)
    assert counter.get_total_flops() == expected.flops
    assert sum(cost.flops.values()) == expected.flops


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_a_real_step_keeps_the_activations_counted_without_running_it(system):
    model, batch = step(system)
    saved = SavedBytes(model)
    with saved:
        model(batch, beta=1.0)
    # beside what is counted the real step keeps vectors of a few numbers per sentence (the KL and its terms)
    assert saved.total == pytest.approx(counted(system, batch.max_seqlen).activation_bytes, rel=0.01)


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_trainable_parameters_are_those_of_the_model(system):
    model, batch = step(system)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == counted(system, batch.max_seqlen).trainable


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [0, 1, 7])  # none, a lone token, more than the window
def test_pairs_are_those_of_the_mask(visibility, window, tokens):
    mask = visibility_mask(tokens, 9, visibility, window)
    assert attention_pairs(tokens, 9, visibility, window) == int(mask.sum())


def test_cost_by_part_adds_up_to_the_whole():
    part = "first"
    a = torch.randn(4, 5)
    with Cost(lambda: part) as cost:
        b = a @ a.T
        part = "second"
        b @ b
    assert cost.flops == {"first": 2 * 4 * 4 * 5, "second": 2 * 4 * 4 * 4}
    assert cost.bytes["second"] == 3 * 16 * 4


def test_unknown_presets_are_refused_by_name():
    with pytest.raises(ConfigError, match="gpt5"):
        preset_config("gpt5", DECODERS)
