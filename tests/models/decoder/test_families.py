"""Thirty kinds of decoder against their own eager code, a type for each thing that a family may do; all: `make families`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmvae_fast import LMVAE, LMVAEConfig
from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.attention import GENERAL
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.injection import Injection
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer
from lmvae_fast.testing.family_check import check_decoder, wrong
from lmvae_fast.testing.mapped_types import tiny_config, tiny_model
from lmvae_fast.text.tokenizer import SentenceTokenizer

KINDS = {
    "afmoe": "gated attention, windows, experts",
    "apertus": "queries and keys with norms",
    "bart": "positions counted from the cache",
    "bert": "a head with a transform",
    "bloom": "ALiBi",
    "codegen": "written-out attention, its own order of query, value, key",
    "cohere": "a scaled head",
    "cohere2": "a scaled head, windows, layers without positions",
    "deepseek_v2": "keys and values of unequal widths",
    "electra": "embeddings of another width, a head with a transform",
    "falcon": "written-out attention, one key head",
    "gemma2": "capped scores and logits, windows",
    "gemma3_text": "two rotations",
    "git": "BERT's attention written out",
    "gpt_bigcode": "one key head",
    "gpt_neo": "unscaled scores, a local window",
    "gpt_neox": "part of a head turned",
    "gpt_oss": "sinks, windows, experts",
    "gptj": "interleaved rotation",
    "granite": "scaled embeddings, residuals, scores and head",
    "jetmoe": "a mixture of attentions",
    "llama": "the ordinary one",
    "llama4_text": "layers without positions, chunks",
    "minicpm3": "latent attention, a scaled head",
    "mpt": "ALiBi of another kind, keys that may be clamped",
    "nemotron": "keyword arguments dropped on the way",
    "roberta": "positions that begin behind the padding token",
    "roformer": "rotation by a table, counted from the cache",
    "stablelm": "keyword arguments dropped on the way",
    "xglm": "BART's attention written out",
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_kind_of_decoder_is_computed_as_its_own_code_does(model_type):
    found = check_decoder(tiny_model(model_type))
    assert wrong(found) == [], found
    assert {"no_memory", "prefix", "interleaved", "gradients", "generation"} <= found.keys()


def test_a_packed_batch_may_be_longer_than_a_sentence():
    """BigBird holds the types of as many tokens as it has positions: 24, and two sentences up to the last one are 42."""
    found = check_decoder(tiny_model("big_bird"))
    assert wrong(found) == [] and "last" in found, found


def test_the_first_gpt_is_right_without_a_cache_of_its_own():
    found = check_decoder(tiny_model("openai-gpt"))
    assert wrong(found) == [], found


@pytest.mark.parametrize(
    ("model_type", "reason"),
    {
        "blt": "patches of bytes",
        "falcon_h1": "keeps a state beside keys and values",
        "lfm2": "layers without keys and values",
        "mllama": "attend to an image",
        "qwen4_exp_text": "layers without keys and values",
        "rwkv": "each keeps a running state",
        "xlm": "reads in both directions",
    }.items(),
)
def test_a_refusal_says_what_about_the_model_is_in_the_way(model_type, reason):
    with pytest.raises(UnsupportedDecoderError, match=reason):
        make(model_type)


def make(model_type):
    return Decoder(tiny_model(model_type), SentenceTokenizer(tiny_tokenizer()))


@pytest.mark.parametrize("wrong_value", [-30.0, 0.0])
def test_a_sink_that_is_left_out_is_seen(wrong_value):
    model = tiny_model("gpt_oss")
    own = model.set_attn_implementation

    def switch(name):
        own(name)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.fill_(wrong_value if name == GENERAL else 1.0)

    model.set_attn_implementation = switch
    with pytest.raises(UnsupportedDecoderError, match="leaves out"):
        Decoder(model, SentenceTokenizer(tiny_tokenizer()))


def test_a_wrong_slot_position_is_seen(monkeypatch):
    monkeypatch.setattr("lmvae_fast.models.decoder.position_columns.slot_position", lambda slot, *_, **__: slot + 1)
    with pytest.raises(UnsupportedDecoderError, match="logits behind a memory"):
        make("bloom")


@pytest.mark.parametrize("model_type", ["cohere", "granite", "bert", "gemma2"])
def test_a_model_is_scored_by_its_own_logits(model_type):
    """The head's factor, cap and transform are in the loss as they are in the logits."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(model_type)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    decoder = Decoder(AutoModelForCausalLM.from_config(config).eval(), SentenceTokenizer(tokenizer))
    encoder = Encoder(tiny_encoder(vocab_size=len(tokenizer)), tokenizer)
    model = LMVAE(
        LMVAEConfig(latent_dim=4, max_len=7, visibility="prefix", slots=2), encoder=encoder, decoder=decoder
    ).eval()
    batch = model.make_batch(model.tokenize(["a cat is an animal", "the sun"]))
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        injection = model.inject(z, batch.annotations, tokens=batch.max_seqlen)
        hidden = decoder.hidden(
            batch.input_ids, injection, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, rows=batch.rows,
            token_index=batch.token_index,
        )  # fmt: skip
        nll = torch.nn.functional.cross_entropy(decoder.logits(hidden), batch.labels, reduction="none")
        expected = torch.zeros(2).index_add(0, batch.rows, nll)
        torch.testing.assert_close(model.score(batch, z), expected, atol=1e-4, rtol=1e-5)


def test_ordinary_decoders_take_the_plain_way():
    for model_type in ("gpt2", "llama", "qwen3", "gemma2", "opt"):
        decoder = make(model_type)
        assert decoder.way.plain and decoder.head.transform is None and decoder.logit_scale == 1.0


@pytest.mark.parametrize("model_type", ["gptj", "bart", "bert"])
def test_a_copy_of_a_decoder_is_a_decoder_of_its_own(model_type):
    decoder = make(model_type)
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    ids, cu_seqlens = torch.arange(4, 9), torch.tensor([0, 5], dtype=torch.int32)
    fields = dict(
        cu_seqlens=cu_seqlens, max_seqlen=5, rows=torch.zeros(5, dtype=torch.long), token_index=torch.arange(5)
    )
    before = decoder.logits(decoder.hidden(ids, None, **fields))
    after = other.logits(other.hidden(ids, None, **fields))
    fresh = Decoder(other.model, SentenceTokenizer(tiny_tokenizer()))
    torch.testing.assert_close(after, fresh.logits(fresh.hidden(ids, None, **fields)))
    assert not torch.allclose(before, after)


def test_alibi_slots_stand_where_they_stand_whatever_the_memory_says():
    decoder = make("bloom")
    shape = (decoder.num_layers, 2, 1, decoder.kv_heads, 3, decoder.head_dim)
    memory = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = memory.clone()
    other[:, 0, ..., -decoder.position_columns :] = 1e3
    ids, cu_seqlens = torch.arange(4, 9), torch.tensor([0, 5], dtype=torch.int32)
    fields = dict(
        cu_seqlens=cu_seqlens, max_seqlen=5, rows=torch.zeros(5, dtype=torch.long), token_index=torch.arange(5)
    )
    got = [decoder.hidden(ids, Injection("prefix", m), **fields) for m in (memory, other)]
    assert torch.equal(*got)
