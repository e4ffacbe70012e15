"""Token dropout: which tokens go, what is read in their place, and that nothing else of a step changes."""

import dataclasses
from statistics import NormalDist

import pytest
import torch

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.token_dropout import dropped_tokens
from lmvae_fast.testing import make_model
from lmvae_fast.text.batch import Share, filled

SENTENCES = ["the cat sat on the mat", "a dog", "plants need light", "ice"]
RATE = 0.3


def parts(**config):
    torch.manual_seed(0)
    model = make_model("llama", max_len=9, projector_dropout=0.0, token_dropout=RATE, **config).train()
    return model, model.make_batch(model.tokenize(SENTENCES))


def read_of(model, batch, seed=3):
    return dropped_tokens(batch, RATE, 9, model.decoder.tokenizer, None, seed)


def test_a_step_reads_the_sentence_without_the_tokens_below_the_quantile():
    model, batch = parts()
    noise = {"z": torch.randn(4, 6), "tokens": torch.randn(4, 9)}
    tokenizer = model.decoder.tokenizer
    unknown = tokenizer.bos_token_id if tokenizer.unknown_id is None else tokenizer.unknown_id
    read = batch.input_ids.clone()
    for token in range(batch.num_tokens):
        row, place = int(batch.rows[token]), int(batch.token_index[token])
        if place and float(noise["tokens"][row, place]) < NormalDist().inv_cdf(RATE):
            read[token] = unknown
    assert 0 < int((read != batch.input_ids).sum()) < batch.num_tokens - 4
    found = model(batch, beta=0.5, eps=noise)
    found.loss.backward()
    gradient = model.projector.weight.grad.clone()
    model.zero_grad()
    plain = make_model("llama", max_len=9, projector_dropout=0.0).train()
    plain.load_state_dict(model.state_dict())
    wanted = plain(dataclasses.replace(batch, input_ids=read), beta=0.5, eps=noise["z"])
    wanted.loss.backward()
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.reconstruction, wanted.reconstruction)
    assert torch.equal(gradient, plain.projector.weight.grad)


def test_it_is_of_training_alone():
    model, batch = parts()
    noise = torch.zeros(4, 6)
    trained = model(batch, eps=noise, seed=1)
    judged = model.eval()(batch, eps=noise, seed=1)
    plain = make_model("llama", max_len=9, projector_dropout=0.0).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(judged.reconstruction, plain(batch, eps=noise).reconstruction)
    assert not torch.equal(trained.reconstruction, judged.reconstruction)


def test_the_share_of_tokens_is_the_rate_and_first_tokens_stay():
    model, batch = parts()
    inner = batch.token_index > 0
    gone = torch.stack([read_of(model, batch, seed) != batch.input_ids for seed in range(400)]).double()
    assert not gone[:, ~inner].any()
    count = gone[:, inner].numel()
    assert abs(float(gone[:, inner].mean()) - RATE) < 4 * (RATE * (1 - RATE) / count) ** 0.5


def test_a_sentence_loses_the_same_tokens_filled_up_and_on_two_processes():
    model, batch = parts()
    whole = read_of(model, batch)
    more = filled(batch, batch.num_tokens + 8, 3, 8)
    assert torch.equal(read_of(model, more)[: batch.num_tokens], whole)
    sentences = model.tokenize(SENTENCES)
    for rank in range(2):
        share = Share(rank, 2, 4)
        own = dataclasses.replace(model.make_batch(sentences, list(share.rows)), share=share)
        want = torch.cat([whole[batch.rows == row] for row in share.rows])
        assert torch.equal(read_of(model, own), want)


def test_what_it_cannot_be_with():
    with pytest.raises(ConfigError, match=r"token_dropout=0\.2 with free_running=True"):
        LMVAEConfig(token_dropout=0.2, free_running=True)
    with pytest.raises(ConfigError, match=r"token_dropout=0\.2"):
        LMVAEConfig(encoder_kind="decoder_layers", token_dropout=0.2)
    with pytest.raises(ConfigError, match=r"0\.999"):
        LMVAEConfig(token_dropout=1.0)
