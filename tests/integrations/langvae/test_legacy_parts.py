"""Model folders of transformers 5 in the terms of transformers 4.48 (make test-peers lets the real one read them)."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers as hf

from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.langvae.files import write_folder
from lmvae_fast.integrations.langvae.legacy_parts import legacy_config, needs_legacy_copy, write_legacy_copy
from lmvae_fast.testing import VOCABULARY, perturbed, tiny_decoder, tiny_tokenizer
from tests.integrations.langvae.test_files import contents

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}


def llama(**rotary):
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, **rotary},
    )
    return perturbed(lambda: hf.LlamaForCausalLM(config), 0)


@pytest.mark.parametrize("rotary", [{}, YARN])
def test_copy_is_the_same_model_and_needs_no_further_copy(tmp_path, rotary):
    model, source = llama(**rotary), tmp_path / "new"
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    assert needs_legacy_copy(source)
    write_legacy_copy(source, tmp_path / "old")
    assert not needs_legacy_copy(tmp_path / "old")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()
    ids = torch.randint(3, VOCABULARY, (1, 60))
    assert torch.equal(again(ids).logits, model(ids).logits)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "old")
    assert tokenizer("a cat")["input_ids"] == tiny_tokenizer()("a cat")["input_ids"]


def test_terms_of_version_4():
    config = legacy_config(
        {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": {"rope_type": "default"} | YARN}
    )
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {name: value for name, value in YARN.items() if name != "rope_theta"}
    assert not config.keys() & {"dtype", "rope_parameters"}
    rotary = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.25}
    config = legacy_config({"model_type": "gpt_neox", "rope_parameters": rotary})
    assert (config["rotary_emb_base"], config["rotary_pct"], config["rope_scaling"]) == (7.0, 0.25, None)
    assert legacy_config({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_folders_of_version_4_are_left_alone(shared):
    for name in ("langvae_gpt2", "langvae_llama"):
        for part in ("encoder_model", "decoder_model"):
            assert not needs_legacy_copy(shared / "golden" / name / part)


def test_what_version_4_cannot_say_is_refused_and_leaves_nothing(tmp_path):
    tiny_decoder("gemma3").save_pretrained(tmp_path / "gemma3")
    with pytest.raises(CheckpointError, match="per kind of layer"):
        write_folder(contents(decoder_path=str(tmp_path / "gemma3")), tmp_path / "model")
    assert os.listdir(tmp_path) == ["gemma3"]


def test_the_source_is_untouched(tmp_path):
    source = tmp_path / "new"
    llama().save_pretrained(source)
    before = (source / "config.json").read_bytes()
    write_legacy_copy(source, tmp_path / "old")
    assert (source / "config.json").read_bytes() == before
    assert "rope_theta" in json.loads((tmp_path / "old" / "config.json").read_text())
