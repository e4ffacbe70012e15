"""Decoders of which a part trains: embeddings and head, adapters, everything in half precision; saved and loaded."""

import sys

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import ConfigError
from lmvae_fast.testing import make_model
from tests.training.helpers import StopAt, assert_same_checkpoint, run

# What each adds: tied embedding and head; an untied head; adapters on transposed weights and on plain ones, the latter
# under autocast with frozen matrices in bf16; everything, in bf16.
CASES = {
    "embeddings, tied": ("gpt2", {"decoder_part": "embeddings"}, {}),
    "embeddings, untied": ("llama", {"decoder_part": "embeddings"}, {"precision": "bf16"}),
    "lora gpt2": ("gpt2", {"decoder_part": "lora", "lora_rank": 2}, {}),
    "lora llama bf16": ("llama", {"decoder_part": "lora", "lora_rank": 3}, {"precision": "bf16"}),
    "optimus bf16": ("gpt2", {"system": "optimus"}, {"precision": "bf16"}),
}


def expected(name, case):
    """Whether a decoder parameter should train."""
    if "optimus" in case:
        return True
    if "lora" in case:
        return ".lora_" in name
    return any(part in name for part in ("wte", "embed_tokens", "lm_head"))


@pytest.mark.parametrize("case", CASES)
def test_what_trains_learns_the_rest_stays_and_a_resumed_run_is_the_same(tmp_path, case):
    if "lora" in case:
        pytest.importorskip("peft")
    family, config, options = CASES[case]
    options = {"max_steps": 10, "log_every": 5, "learning_rate": 0.005, "beta_schedule": "constant", **options}

    def build():
        return make_model(family, max_len=12, **config)

    model = build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    for name, value in model.decoder.named_parameters():
        assert value.requires_grad == expected(name, case), name
    whole = run(tmp_path / "whole", model=model, **options)
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert value.requires_grad or torch.equal(value, before[name]), name
    moved = [
        name for name, value in model.decoder.named_parameters() if not torch.equal(value, before[f"decoder.{name}"])
    ]
    assert moved
    first, last = [record["loss"] for record in whole.history if record["kind"] == "train"]
    assert last < first

    run(tmp_path / "broken", StopAt(4), model=build(), **options)
    resumed = run(tmp_path / "broken", model=build(), resume=True, **options)
    assert_same_checkpoint(resumed.checkpoint, whole.checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_it_says_the_same(tmp_path, case):
    if "lora" in case:
        pytest.importorskip("peft")
    family, config, _ = CASES[case]
    model = make_model(family, max_len=12, **config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    again = lf.LMVAE.from_pretrained(tmp_path / "model")
    batch = model.make_batch(model.tokenize(["a cat is a kind of animal", "ice"]))
    eps = torch.zeros(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(batch, eps=eps).nll, model(batch, eps=eps).nll)


def test_adapters_start_as_no_change():
    pytest.importorskip("peft")
    plain, tuned = make_model(max_len=12), make_model(max_len=12, decoder_part="lora")
    tuned.load_state_dict({**tuned.state_dict(), **{k: v for k, v in plain.state_dict().items() if "decoder" not in k}})
    batch = plain.make_batch(plain.tokenize(["a cat is a kind of animal"]))
    with torch.no_grad():
        losses = [model.eval()(batch, eps=torch.zeros(1, 6)).loss for model in (plain, tuned)]
    torch.testing.assert_close(*losses)


def test_half_precision_parts_that_train_are_loaded_in_float32(tmp_path):
    make_model(max_len=12, system="optimus").save_pretrained(tmp_path / "model", include_frozen=True)
    model = lf.LMVAE.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_bad_choices(monkeypatch):
    with pytest.raises(ConfigError, match="decoder_part"):
        lf.LMVAEConfig(decoder_part="half")
    with pytest.raises(ConfigError, match="train_decoder=False"):
        lf.LMVAEConfig(decoder_part="lora", train_decoder=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmvae_fast\[lora\]'"):
        make_model(decoder_part="lora")
