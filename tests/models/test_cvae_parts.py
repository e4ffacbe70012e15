"""System cvae part by part: adapters and encoders on decoders of every kind, saving, folders, and bad input."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.data import PromptResponse
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LatentError, UnsupportedDecoderError
from lmvae_fast.integrations.cvae import load_checkpoint
from lmvae_fast.models.adapter import AdapterProjector
from lmvae_fast.models.layer_encoder import LayerEncoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import make_decoder, make_model
from tests.models.cvae_cases import ITEMS, both, released, twin


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_neox", "opt"])
@pytest.mark.parametrize("own", [False, True])
def test_an_adapter_fits_decoders_of_every_kind(family, own):
    """That its maps are the layers' own is proved when it is made (else the next test but one)."""
    _, decoder = make_decoder(family)
    projector = AdapterProjector(6, decoder, slots=3, own_projections=own)
    z = torch.randn(2, 6)
    memory = projector(z, dtype=torch.float32)
    assert memory.shape == (3, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    out = torch.empty_like(memory)
    assert projector(z, dtype=torch.float32, out=out) is out and torch.equal(out, memory)
    trained = {name for name, _ in projector.named_parameters()}
    assert any(name.startswith("own.") for name in trained) is own
    if own:
        memory.square().sum().backward()
        assert all(parameter.grad is not None for parameter in projector.parameters())


def test_an_adapter_follows_its_decoder(tmp_path):
    """Shared projections are the decoder's at every call, not as they were."""
    _, decoder = make_decoder("llama")
    projector = AdapterProjector(6, decoder, slots=2)
    z = torch.randn(1, 6)
    before = projector(z, dtype=torch.float32)
    with torch.no_grad():
        decoder.model.model.layers[1].self_attn.v_proj.weight.mul_(2)
    after = projector(z, dtype=torch.float32)
    torch.testing.assert_close(after[1, 1], 2 * before[1, 1])
    torch.testing.assert_close(after[0], before[0])


def test_projections_that_cannot_be_shared_are_refused():
    """Keys that are something else than a projection of what attention reads: as latent attention's are."""
    _, decoder = make_decoder("llama")
    attention = decoder.model.model.layers[1].self_attn
    inner = attention.k_proj

    class Compressed(torch.nn.Module):
        weight, bias = inner.weight, inner.bias

        def forward(self, x):
            return inner(torch.tanh(x))

    attention.k_proj = Compressed()
    with pytest.raises(UnsupportedDecoderError, match=r"keys of LlamaAttention .* adapter"):
        AdapterProjector(6, decoder, slots=2)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "opt", "gpt_neox"])
def test_any_decoders_first_layers_encode(family):
    """Each response alone and all together give the same posterior: nothing is padded, nothing leaks."""
    _, decoder = make_decoder(family)
    torch.manual_seed(0)
    model = LMVAE(LMVAEConfig(system="cvae", latent_dim=8, max_len=9, stage=1), decoder=decoder)
    torch.nn.init.normal_(model.posterior_head.out.weight)
    together = model.encode(ITEMS)
    assert together.mu.std(0).min() > 1e-3
    for row, item in enumerate(ITEMS):
        torch.testing.assert_close(model.encode([item]).mu[0], together.mu[row], rtol=1e-4, atol=1e-4)
    assert len(next(m for m in model.encoder.layers.modules() if isinstance(m, torch.nn.ModuleList))) == 2
    model(ITEMS, seed=0).loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters() if p.requires_grad)


def test_an_encoder_begins_at_the_prior_and_knows_its_decoder():
    _, decoder = make_decoder("llama")
    model = LMVAE(LMVAEConfig(system="cvae", latent_dim=8, max_len=9), decoder=decoder)
    posterior = model.encode(ITEMS)
    assert not posterior.mu.any() and not posterior.logvar.any()
    assert isinstance(model.encoder, LayerEncoder) and model.encoder.embedding is None and model.projector.own is None
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "posterior_head", "projector", "residual"}
    table = decoder.model.get_input_embeddings().weight
    torch.testing.assert_close(model.encoder.query[1], table[1 : len(table) // 4 * 4 : 4].mean(0))


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_saved_model_is_the_same(tmp_path, stage):
    _, decoder = make_decoder("llama", train=stage == 0)
    torch.manual_seed(0)
    config = LMVAEConfig(system="cvae", latent_dim=8, max_len=9, stage=stage, embedding_shift=True)
    model = LMVAE(config, decoder=decoder).eval()
    for parameter in model.trainable_state_dict().values():
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    again = LMVAE.from_pretrained(tmp_path / "model")
    batch = model.make_batch(model.tokenize(ITEMS))
    assert torch.equal(model(batch, seed=3).loss, again(again.make_batch(again.tokenize(ITEMS)), seed=3).loss)
    assert again.config.stage == stage


def test_folders_that_are_refused(tmp_path):
    eager = twin()
    saved, base = released(eager, tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path, base_model=base)
    with pytest.raises(CheckpointError, match=r"missing \['embedding_shift"):
        load_checkpoint(saved, base_model=base, embedding_shift=True)
    state = {"latent_encoder.norm.weight": torch.ones(32), "unknown": torch.ones(1)}
    save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="foreign"):
        load_checkpoint(saved, base_model=base)
    save_file({"unknown": torch.ones(1)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="no CVAE"):
        load_checkpoint(saved, base_model=base)
    save_file({**state, "latent_decoder.model.norm.weight": torch.ones(7)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="base model's kind"):
        load_checkpoint(saved, base_model=base)


def test_stage_2_with_copies_of_its_own_keeps_them(tmp_path, caplog):
    """Copies that a run of stage 1 trained, and stage 2 froze, are no longer the decoder's."""
    eager = twin(stage=2)
    saved, base = released(eager, tmp_path)  # perturbed: every copy differs
    model = load_checkpoint(saved, base_model=base, max_len=9)
    assert model.config.stage == 1 and "no longer the decoder's" in caplog.text
    torch.testing.assert_close(model.encode(ITEMS).mu, eager.encode(ITEMS)[0], rtol=1e-4, atol=1e-5)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_texts_are_refused(tmp_path):
    _, model = both(tmp_path)
    for items, message in (
        ([], "no responses"),
        ([object()], "no prompt with a response"),
        (["", "  "], "response 0 is empty"),
    ):
        with pytest.raises(DataError, match=message):
            model.encode(items)
    long = PromptResponse("the sun is", " a star" * 20)
    with pytest.raises(DataError, match="too long"):
        model.tokenize([long], on_long="error")
    with pytest.raises(DataError, match="no response is left"):
        model.tokenize([long], on_long="drop")
    model.config = model.config.replace(max_prompt_len=2)
    assert model.tokenize(ITEMS).report["prompts_cut"] == 4
    assert model.tokenize(ITEMS).prompt_lengths == [2] * 4
    with pytest.raises(LatentError, match="does not fit the batch"):
        model(ITEMS, eps={"z": torch.zeros(3, 8, 1)})


def test_other_systems_refuse_prompts():
    with pytest.raises(DataError, match="not prompts with responses"):
        make_model().encode(ITEMS)


def test_contradictions_are_refused():
    for fields, message in (
        ({"encoder_kind": "text", "kl_mode": "density_gap"}, "text encoder"),
        ({"encoder_kind": "decoder_layers", "annotations": ("a",)}, "no such option"),
        ({"encoder_kind": "decoder_layers", "free_running": True}, "no such option"),
        ({"encoder_kind": "decoder_layers", "latent_dim": 7}, "equal share"),
        ({"stage": 2, "train_decoder": True}, "train_decoder says otherwise"),
        ({"stage": 0, "decoder_part": "lora"}, "decoder_part says otherwise"),
        ({"stage": 3}, "out of range"),
        ({"encoder_kind": "text", "contrast": True}, "responses to a prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            LMVAEConfig(system="cvae", **fields)
    _, decoder = make_decoder("llama", max_positions=16)
    with pytest.raises(ConfigError, match=r"positions"):  # slots, prompt and response past the decoder's positions
        LMVAE(LMVAEConfig(system="cvae", latent_dim=8, max_len=9, max_prompt_len=8), decoder=decoder)
    with pytest.raises(ConfigError, match="encoder_layers"):
        LMVAE(LMVAEConfig(system="cvae", latent_dim=8, max_len=9, encoder_layers=4), decoder=decoder)
