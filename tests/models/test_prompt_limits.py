"""Prompts that are longer than a decoder's positions, that end within a word, or that are not given at all."""

import logging

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.config import LMVAEConfig, PlainDecoderConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.inputs import most_of_prompt
from lmvae_fast.models.plain_decoder import PlainDecoder
from lmvae_fast.testing import make_decoder, make_model

PR = lf.PromptResponse
LONG = "the cat sat on the mat and " * 60


def system(family="llama", **options):
    return make_model(family, system="cvae", latent_dim=8, max_len=6, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_keep_what_the_positions_leave_and_the_cut_are_counted(family):
    model = system(family)
    positions = model.decoder.max_positions
    most = most_of_prompt(model.config, model.decoder)
    assert most == positions - max(model.config.slots, model.config.queries + 1) - 6
    rows = model.tokenize([PR(LONG, " is here"), PR("the sun", " is a star")])
    assert max(rows.prompt_lengths) == most and rows.report["prompts_cut"] == 1
    found = model(model.make_batch(rows), beta=1.0)
    assert torch.isfinite(found.loss)
    assert model.decode(torch.zeros(1, 8), prompts=[LONG], max_new_tokens=6)
    assert most_of_prompt(model.config.replace(max_prompt_len=5), model.decoder) == 5


def test_a_fine_tuned_decoder_cuts_alike():
    _, decoder = make_decoder("gpt2", train=True)
    model = PlainDecoder(PlainDecoderConfig(decoder="given", max_len=6), decoder=decoder)
    rows = model.tokenize([PR(LONG, " is here")])
    assert rows.prompt_lengths == [decoder.max_positions - 6] and rows.report["prompts_cut"] == 1
    assert torch.isfinite(model(model.make_batch(rows)).loss)


def test_a_prompt_that_ends_within_a_word_takes_nothing_of_its_response(caplog):
    model = system()
    pairs = [PR("a cat is ", "a kind of animal"), PR("a cat is ", "is"), PR("the sun", " is a star")]
    with caplog.at_level(logging.WARNING):
        rows = model.tokenize(pairs)
    assert rows.texts == ["a kind of animal", "is", "is a star"]
    assert (rows.report["apart"], rows.report["empty"]) == (2, 0) and "'apart': 2" in caplog.text
    alone = model.decoder.tokenizer.encode_whole(["a cat is "])[0]
    assert rows.ids[0][: rows.prompt_lengths[0]] == alone  # what the decoder will read before it answers
    released = system(encoder_padding="released").tokenize(pairs)
    assert released.texts[0] != "a kind of animal"  # as the public code parts them


def test_answering_no_prompt_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        system().eval().decode(torch.zeros(2, 8), max_new_tokens=2)
    assert "prompts=" in caplog.text


def test_groups_of_one_are_told_where_a_loss_goes_by_them(caplog):
    pairs = [PR("the sun", " is a star"), PR("the sun", " is hot")]
    with caplog.at_level(logging.WARNING):
        assert system(group_size=1).tokenize(pairs).report["single"] == 2
    assert "2 groups are one response" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        system(kl_mode="sum").tokenize(pairs[:1])
    assert "density gap" not in caplog.text


def test_a_normal_start_is_refused_for_maps_that_are_copies():
    for options in ({"encoder_kind": "decoder_layers"}, {"projector": "adapter", "visibility": "prefix", "slots": 4}):
        with pytest.raises(ConfigError, match="latent_init='normal'"):
            LMVAEConfig(latent_init="normal", **options)
    with pytest.raises(ConfigError, match="latent_init='normal'"):
        system(latent_init="normal", stage=1)


def test_responses_that_leave_no_place_for_a_prompt_are_refused():
    decoder = make_decoder("gpt2", train=True)[1]
    fits = decoder.max_positions - 1
    PlainDecoder(PlainDecoderConfig(decoder="given", max_len=fits), decoder=decoder)
    with pytest.raises(ConfigError, match="max_prompt_len"):
        PlainDecoder(PlainDecoderConfig(decoder="given", max_len=fits + 1), decoder=decoder)
    with pytest.raises(ConfigError, match="max_prompt_len"):
        make_model("gpt2", system="cvae", latent_dim=8, max_len=fits - 3)  # 4 slots
