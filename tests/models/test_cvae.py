"""System cvae on tiny models: the fast path against the eager twin, in both forms; its parts; bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lmvae_fast.config import GenerationConfig, LMVAEConfig
from lmvae_fast.data import PromptResponse
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LatentError, UnsupportedDecoderError
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.scoring import score
from lmvae_fast.integrations.cvae import load_checkpoint
from lmvae_fast.integrations.cvae.names import fused_places, place_of
from lmvae_fast.models.adapter import AdapterProjector
from lmvae_fast.models.latents import draw_latents
from lmvae_fast.models.layer_encoder import LayerEncoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.reference.cvae import ReferenceCVAE
from lmvae_fast.reference.cvae_parts import CVAESettings
from lmvae_fast.testing import make_decoder, make_model, perturbed, tiny_decoder, tiny_tokenizer

ITEMS = [
    PromptResponse("the sun is", " a star"), PromptResponse("the sun is", " a kind of light to live"),
    PromptResponse("the sun is", " food"), PromptResponse("the sun is", " an object"),
]  # fmt: skip
OTHERS = [PromptResponse("plants need", " water"), PromptResponse("plants need", " light to grow and food")]


def twin(family="llama", **settings):
    """An eager CVAE with parameters that are no longer as they begin."""
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(family, vocab_size=len(tokenizer))
    defaults = {"latent_dim": 8, "queries": 2, "slots": 3, "stage": 1}
    model = perturbed(lambda: ReferenceCVAE(decoder, tokenizer, CVAESettings(**{**defaults, **settings})), seed=3)
    model.max_response = 9
    return model


def released(model, folder):
    """The folders of base model and CVAE that the public code would have saved of an eager twin."""
    settings, config = model.settings, model.config
    base, saved = folder / "base", folder / "cvae"
    family = config.model_type
    tiny_decoder(family, vocab_size=config.vocab_size).save_pretrained(base)
    model.tokenizer.save_pretrained(base)
    own = {
        "num_q": settings.queries, "dim_z": settings.latent_dim, "num_p": settings.slots, "vae_type": settings.vae_type,
        "num_latent_encoder_layers": settings.encoder_layers, "add_skip_connection": settings.skip,
    }  # fmt: skip
    if family == "gpt2":
        own |= {
            "frozen_pretrained": settings.stage, "add_contra_loss": int(settings.contrast),
            "add_ghost_skip_connection": settings.gskip,
        }  # fmt: skip
    else:
        own |= {"frozen_stage": settings.stage, "add_gskip_connection": settings.gskip}
    saved.mkdir(parents=True)
    (saved / "config.json").write_text(json.dumps({**config.to_dict(), **own}, default=str))
    save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, saved / "model.safetensors")
    return saved, base


def both(tmp_path, family="llama", padding="masked", **settings):
    """An eager twin and the fast model with its parameters, loaded from its folder."""
    eager = twin(family, padding=padding, **settings)
    saved, base = released(eager, tmp_path)
    return eager, load_checkpoint(saved, base_model=base, padding=padding, max_len=9, max_prompt_len=64)


def noise_for(batch, latent_dim=8):
    size, length = batch.input_ids.shape
    counts = {"z": 1, "emb": 1, "skip": 32, "kl": 16, "bow": length}
    return {name: torch.randn(size, latent_dim, count) for name, count in counts.items()}


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


SETTINGS = [
    ("llama", {}),
    ("llama", {"padding": "released"}),
    ("llama", {"vae_type": "Vanilla", "gskip": 0}),
    ("llama", {"vae_type": "FB-VAE", "gskip": 0, "skip": 1}),
    ("llama", {"vae_type": "EMB-DG-VAE", "gskip": 2}),
    ("llama", {"vae_type": "BOW-VAE", "gskip": 0, "skip": 2}),
    ("llama", {"stage": 0}),
    ("gpt2", {}),
    ("gpt2", {"padding": "released"}),
    ("gpt2", {"vae_type": "Vanilla", "gskip": 0, "skip": 1}),
    ("gpt2", {"contrast": True}),
    ("gpt2", {"stage": 0, "contrast": True, "gskip": 0}),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=lambda value: str(value))
def test_posterior_loss_and_gradients_are_the_twins(tmp_path, family, settings):
    eager, model = both(tmp_path, family, **settings)
    padded = eager.batch(ITEMS)
    noise = noise_for(padded)
    want = eager.loss(padded, noise)
    batch = model.make_batch(model.tokenize(ITEMS))
    posterior = model.encode(batch)
    torch.testing.assert_close(posterior.mu, want.mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, want.logvar, rtol=1e-4, atol=1e-5)
    got = model(batch, eps=noise)
    torch.testing.assert_close(got.reconstruction, want.nll, rtol=1e-4, atol=1e-4)
    assert abs(got.loss / want.loss - 1) < 1e-5
    if eager.settings.contrast:
        assert want.loss_contrast > 0.1
        torch.testing.assert_close(got.auxiliary, want.loss_contrast.detach(), rtol=1e-4, atol=1e-4)
    want.loss.backward()
    got.loss.backward()
    compare_gradients(model, eager)


def compare_gradients(model, eager):
    parameters = dict(model.named_parameters())
    compared = set()
    for name, parameter in eager.named_parameters():
        if not parameter.requires_grad or parameter.grad is None:
            continue
        place = place_of(name)
        for where, of_file in fused_places(name) or ([] if place is None else [(place, lambda tensor: tensor)]):
            want = of_file(parameter.grad)
            got = where.of(parameters[where.name].grad).reshape(want.shape)
            assert (got - want).norm() <= 2e-4 * want.norm() + 1e-5, name
            compared.add(where.name)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert compared == trained and len(compared) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_are_the_twins(tmp_path, family):
    eager, model = both(tmp_path, family)
    z = torch.randn(3, 8)
    prompts = ["the sun is", "plants need", "the moon moves around a"]
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=2)
    got = [out.ids for out in generate(model, z, config, prompts=prompts)]
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([eager.tokenizer(prompt)["input_ids"]])
        want = eager.generate_ids(ids, z[row : row + 1], max_new_tokens=6)[0, ids.shape[1] :].tolist()
        assert got[row] == (want[: want.index(2)] if 2 in want else want)


def test_no_end_before_the_least_length(tmp_path):
    _, model = both(tmp_path, "gpt2")
    with torch.no_grad():
        model.decoder.head_weight.zero_()
        norm = model.decoder.model.transformer.ln_f
        norm.weight.zero_()
        model.decoder.head_weight[2] = norm.bias  # the end token is always the likeliest
    z = torch.randn(2, 8)
    for least, beams in ((0, 1), (2, 1), (3, 2)):
        config = GenerationConfig(max_new_tokens=5, min_new_tokens=least, num_beams=beams)
        found = list(generate(model, z, config, prompts="the sun"))
        assert [len(out.ids) for out in found] == [least, least] and all(out.finished for out in found)


def test_one_to_many_answers_of_one_prompt(tmp_path):
    _, model = both(tmp_path)
    z = torch.randn(5, 8)
    texts = model.decode(z, prompts="the sun is", max_new_tokens=5, do_sample=True, seed=1)
    assert len(texts) == 5 and len(set(texts)) > 1
    assert texts == model.decode(z, prompts=["the sun is"] * 5, max_new_tokens=5, do_sample=True, seed=1)
    assert not any(text.startswith("the sun") for text in texts)  # the response alone
    scores = score(model, z[:4], ITEMS)
    batch = model.make_batch(model.tokenize(ITEMS))
    torch.testing.assert_close(scores, -model.score(batch, z[:4]), rtol=1e-5, atol=1e-5)


# Groups ---------------------------------------------------------------------------------------------------------------


def test_no_two_prompts_share_an_aggregate(tmp_path):
    _, model = both(tmp_path)
    alone = [model.make_batch(model.tokenize(items)) for items in (ITEMS, OTHERS)]
    together = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    mixed_order = [0, 4, 1, 2, 5, 3]
    mixed = model.make_batch(model.tokenize([[*ITEMS, *OTHERS][row] for row in mixed_order]))
    assert together.cu_groups.tolist() == [0, 4, 6] and mixed.cu_groups is None and together.max_group == 4
    noise = {name: torch.randn(6, 8, count) for name, count in (("z", 1), ("kl", 16), ("skip", 32))}
    got = model(together, eps=noise)
    first = model(alone[0], eps={name: value[:4] for name, value in noise.items()})
    second = model(alone[1], eps={name: value[4:] for name, value in noise.items()})
    torch.testing.assert_close(got.kl, torch.cat([first.kl, second.kl]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, (4 * first.loss + 2 * second.loss) / 6, rtol=1e-5, atol=1e-5)
    moved = model(mixed, eps={name: value[mixed_order] for name, value in noise.items()})
    torch.testing.assert_close(moved.kl, got.kl[mixed_order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.loss, got.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"vae_type": "BOW-VAE", "gskip": 0}, {"family": "gpt2", "contrast": True}])
def test_auxiliary_terms_are_means_over_prompts(tmp_path, settings):
    settings = dict(settings)
    _, model = both(tmp_path, settings.pop("family", "llama"), **settings)
    together = model.make_batch(model.tokenize([*ITEMS, *OTHERS]))
    noise = {name: torch.randn(6, 8, n) for name, n in (("z", 1), ("kl", 16), ("skip", 32), ("bow", 40))}
    got = model(together, eps=noise).auxiliary
    parts = []
    for items, rows in ((ITEMS, slice(0, 4)), (OTHERS, slice(4, 6))):
        batch = model.make_batch(model.tokenize(items))
        parts.append(model(batch, eps={name: value[rows] for name, value in noise.items()}).auxiliary)
    torch.testing.assert_close(got, (4 * parts[0] + 2 * parts[1]) / 6, rtol=1e-4, atol=1e-5)


def test_a_prompt_with_one_response_has_the_plain_kl(tmp_path, caplog):
    _, model = both(tmp_path)
    sentences = model.tokenize(OTHERS[:1])
    assert sentences.report["single"] == 1 and "plain KL" in caplog.text
    draws = model.config.replace(kl_samples=20_000)
    model.config = draws
    with torch.no_grad():
        out = model(model.make_batch(sentences), seed=0)
    kl = model.encode(OTHERS[:1]).kl()
    torch.testing.assert_close(out.kl, kl, rtol=0.05, atol=0.05)


def test_many_responses_make_several_groups(tmp_path):
    _, model = both(tmp_path)
    model.config = model.config.replace(group_size=3)
    items = [
        PromptResponse("the sun is", f" {word}") for word in ["a", "star", "an", "object", "light", "food", "water"]
    ]
    assert model.tokenize(items).groups == [0, 1, 2, 0, 1, 2, 0]  # slice s: responses s, s + 3, ..


def test_a_seed_decides_the_noise_and_every_part_has_its_own(tmp_path):
    _, model = both(tmp_path, vae_type="EMB-DG-VAE", gskip=0, skip=1)
    batch = model.make_batch(model.tokenize(ITEMS))
    first, again, other = (model(batch, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.loss, again.loss) and not torch.equal(first.loss, other.loss)
    sigma = torch.exp(0.5 * first.logvar)
    draws = draw_latents(model.config, model.encode(batch), batch, beta=1.0, noise=None, seed=5)
    assert torch.equal(draws.z, first.z)
    for part in (draws.shift, draws.residual[:, 0]):
        assert ((part - draws.z) / sigma).abs().min() > 1e-6


# Parts ----------------------------------------------------------------------------------------------------------------


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
