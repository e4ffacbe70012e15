"""Beam search against exhaustive search, against greedy decoding, and in batches."""

from __future__ import annotations

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.generation.engine import generate
from lmvae_fast.testing import make_model
from tests.generation.test_engine import end_with_a_common_token


def logprobs_after(model, z, prefixes):
    """ln p of every next token after each of some token sequences of one length: [len(prefixes), vocabulary]."""
    with torch.no_grad():
        injection = model.inject(z.expand(len(prefixes), -1))
        cache = model.decoder.new_cache(injection, batch=len(prefixes), max_tokens=len(prefixes[0]) + 1)
        cache.place(torch.arange(len(prefixes)), injection)
        start = torch.full((len(prefixes),), model.decoder.tokenizer.bos_token_id)
        for token in (start, *torch.tensor(prefixes).reshape(len(prefixes), -1).long().T):
            logits = model.decoder.step(token, cache, injection)
        return logits.log_softmax(-1)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_sentence(visibility, length_penalty):
    model = make_model("gpt2", visibility=visibility, slots=10).eval()
    z = 2 * torch.randn(2, 6)
    model.decoder.tokenizer.eos_token_id = int(logprobs_after(model, z[:1], [[]])[0].topk(5).indices[4])
    eos, vocabulary = model.decoder.tokenizer.eos_token_id, model.decoder.vocab_size
    config = GenerationConfig(num_beams=vocabulary, max_new_tokens=2, length_penalty=length_penalty)
    for row, out in enumerate(generate(model, z, config)):
        first = logprobs_after(model, z[row : row + 1], [[]])[0]
        second = logprobs_after(model, z[row : row + 1], [[token] for token in range(vocabulary)])
        both = (first[:, None] + second) / 2**length_penalty
        both[eos] = -torch.inf
        best = both.max()
        flat = int(both.argmax())
        expected = [flat // vocabulary, flat % vocabulary]
        if first[eos] > best:  # the sentence that ends at once
            expected = []
        assert out.ids == [token for token in expected if token != eos]


def test_one_beam_is_greedy_and_more_are_no_worse():
    model = make_model("llama").eval()
    z = 2 * torch.randn(9, 6)
    end_with_a_common_token(model, z)
    greedy = list(generate(model, z))

    def total(row, out):
        labels = [*out.ids, model.decoder.tokenizer.eos_token_id] if out.finished else out.ids
        steps = (logprobs_after(model, z[row : row + 1], [labels[:i]])[0, labels[i]] for i in range(len(labels)))
        return float(sum(steps))

    config = GenerationConfig(num_beams=4, length_penalty=0.0)
    wide = list(generate(model, z, config))
    assert [out.index for out in wide] == list(range(9))
    better = [total(row, out) - total(row, before) for row, (out, before) in enumerate(zip(wide, greedy, strict=True))]
    assert (
        sum(better) > 0.1 and sum(gain > -1e-4 for gain in better) >= 8
    )  # a beam may lose the greedy sentence on the way
    for batch_size in (1, 8, 20):
        other = generate(model, z, config.replace(batch_size=batch_size))
        assert [out.ids for out in other] == [out.ids for out in wide]


def test_prompts_before_beams():
    model = make_model("gpt2").eval()
    z = 2 * torch.randn(3, 6)
    config = GenerationConfig(num_beams=3, max_new_tokens=4)
    outs = list(generate(model, z, config, prompts="the sun"))
    assert all(out.text.startswith("the sun") and len(out.ids) <= 4 for out in outs)
    texts = ["", "the sun", "ice is water"]
    each = list(generate(model, z, config, prompts=texts))
    for row, text in enumerate(texts):
        (alone,) = generate(model, z[row : row + 1], config, prompts=text)
        assert (each[row].text, each[row].ids) == (alone.text, alone.ids)
    assert each[1] == outs[1]


def test_what_does_not_go_with_beams():
    for options in ({"do_sample": True}, {"logprobs": True}, {"repetition_penalty": 1.2}):
        with pytest.raises(ConfigError, match="beam search"):
            GenerationConfig(num_beams=2, **options)
