"""Memory that starts as the start token's keys and values: against Hugging Face's own cache holding copies of that token."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import lmvae_fast as lf
from lmvae_fast.errors import ConfigError, TokenizerError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.memory_start import token_memory
from lmvae_fast.testing import FAMILIES, SENTENCES, make_decoder, make_model, tiny_decoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer

LEARNT_POSITIONS = ("gpt2", "opt")  # their keys stand at position 0 in every slot of an adapter


def eager(family):
    return tiny_decoder(family, vocab_size=len(tiny_tokenizer()))


@torch.no_grad()
def entries(model, position):
    """Keys and values of the start token by itself at a position, of every layer, as Hugging Face caches them."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([[1]]), position_ids=torch.tensor([[position]]), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def eager_logits(model, ids, visibility, slots, places):
    """Logits of one sentence behind copies of the start token, one token at a time. places: position of each slot's copy."""
    cache, rows = DynamicCache(), []
    copies = [entries(model, place) for place in places]

    def add(slot):
        for layer, (key, value) in enumerate(copies[slot]):
            cache.update(key, value, layer)

    for slot in range(slots) if visibility == "prefix" else ():
        add(slot)
    for i, token in enumerate(ids):
        if visibility == "interleaved":
            add(i)
        position = slots + i if visibility == "prefix" else 2 * i + 1
        out = model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[position]]), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def our_logits(model, batch, z):
    hidden = model.decoder.hidden(
        batch.input_ids, model.inject(z, tokens=batch.max_seqlen), cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen, rows=batch.rows, token_index=batch.token_index,
    )  # fmt: skip
    return model.decoder.logits(hidden)


def without_weight(model):
    """The model with memory that does not depend on z."""
    projector = model.projector
    with torch.no_grad():
        (projector.weight if hasattr(projector, "weight") else projector.up_weight).zero_()
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("projector", "visibility"), [("linear", "interleaved"), ("mlp", "prefix"), ("linear", "prefix"),
                                                       ("adapter", "prefix")])  # fmt: skip
def test_sink_memory_is_copies_of_the_start_token_in_the_cache(family, projector, visibility):
    slots = {"interleaved": None, "prefix": 3}[visibility]
    model = without_weight(
        make_model(family, memory_init="sink", projector=projector, visibility=visibility, slots=slots)
    )
    sentences = model.tokenize(SENTENCES[:3])
    batch = model.make_batch(sentences)
    logits = our_logits(model, batch, torch.randn(3, 6))
    turned = projector == "adapter" and family not in LEARNT_POSITIONS
    places = range(3) if turned else [0] * 10
    for i, part in enumerate(logits.tensor_split(batch.cu_seqlens[1:-1].long())):
        ids = batch.input_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist()
        torch.testing.assert_close(
            part, eager_logits(eager(family), ids, visibility, slots or 0, places), rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("projector", ["linear", "mlp", "adapter"])
def test_gradients_flow_from_the_start(projector):
    model = make_model("llama", memory_init="sink", projector=projector, visibility="prefix", slots=2)
    model(SENTENCES[:4], seed=0).loss.backward()
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    assert {name.split(".")[0] for name, _ in trained} == {"posterior_head", "projector"}
    for name, parameter in trained:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_what_depends_on_z_starts_small():
    small, random = (make_model("gpt2", memory_init=kind).eval() for kind in ("sink", "random"))
    z = torch.randn(5, 6)
    spread = [model.inject(z).memory.std(2).mean() for model in (small, random)]
    assert 0 < spread[0] < 0.05 * spread[1]


def test_the_mean_is_over_tokens_behind_a_start_token_unturned():
    """Against Hugging Face, token by token; keys at another position are others."""
    _, decoder = make_decoder("llama")
    model, size = eager("llama"), len(tiny_tokenizer())
    sums = None
    ids = [token for token in range(0, size, max(size // 256, 1)) if token > 2]  # three are special
    for token in ids:
        cache = DynamicCache()
        with torch.no_grad():
            model(
                input_ids=torch.tensor([[1, token]]),
                position_ids=torch.zeros(1, 2, dtype=torch.int64),
                past_key_values=cache,
            )
        found = torch.stack([torch.stack([x.keys[0, :, 1], x.values[0, :, 1]]) for x in cache.layers])
        sums = found if sums is None else sums + found
    torch.testing.assert_close(token_memory(decoder, "mean"), sums / len(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(token_memory(decoder, "mean"), token_memory(decoder, "sink"), atol=1e-2)


def test_saved_and_loaded(tmp_path):
    model = make_model("llama", memory_init="sink").eval()
    with torch.no_grad():
        model.projector.bias.add_(0.1)  # as training does
    model.save_pretrained(tmp_path / "model")
    loaded = lf.LMVAE.from_pretrained(tmp_path / "model")
    assert loaded.config.memory_init == "sink"
    torch.testing.assert_close(loaded.projector.bias, model.projector.bias, rtol=0, atol=0)


@pytest.mark.parametrize("system", ["langvae", "optimus", "llamavae", "cvae"])
def test_published_systems_start_at_random(system):
    from lmvae_fast.models.systems import resolve

    assert resolve(lf.LMVAEConfig(system=system)).memory_init == "random"


@pytest.mark.parametrize("projector", ["shared", "none"])
@pytest.mark.parametrize("kind", ["sink", "mean"])
def test_a_projector_that_cannot_hold_it_is_refused(projector, kind):
    options = {"embedding_shift": True, "visibility": "prefix", "slots": 1}
    with pytest.raises(ConfigError, match=f"memory_init='{kind}' with projector='{projector}'.*random"):
        lf.LMVAEConfig(memory_init=kind, projector=projector, **options)
    with pytest.raises(ConfigError, match="memory_init"):  # the projector is the preset's
        make_model("gpt2", system="optimus", memory_init=kind, encoder="bert", pooling="mean")


# ---- the start token -------------------------------------------------------------------------------------------------


def with_start(start_token, family="llama"):
    tokenizer = SentenceTokenizer(tiny_tokenizer(), start_token=start_token)
    return Decoder(eager(family), tokenizer)


def test_a_start_token_of_ones_own():
    decoder = with_start("</s>")
    assert decoder.tokenizer.bos_token_id == 2 and not decoder.tokenizer.starts_with_end
    memory = token_memory(decoder, "sink")
    assert not torch.allclose(memory, token_memory(with_start(None), "sink"), atol=1e-3)


def test_a_start_token_of_a_loaded_model(tmp_path):
    plain = make_model("llama")
    plain.save_pretrained(tmp_path / "plain")
    model = lf.LMVAE.from_pretrained(tmp_path / "plain", start_token="</s>")
    sentences = model.tokenize(SENTENCES[:2])
    assert model.make_batch(sentences).input_ids[0] == 2
    model.save_pretrained(tmp_path / "model")
    assert lf.LMVAE.from_pretrained(tmp_path / "model").decoder.tokenizer.bos_token_id == 2
    with pytest.raises(TokenizerError, match=r"'<\|endoftext\|>'.*</s>"):
        lf.LMVAE.from_pretrained(tmp_path / "plain", start_token="<|endoftext|>")


def test_a_decoder_that_begins_otherwise_than_configured_is_refused():
    from lmvae_fast.models.encoder import Encoder
    from lmvae_fast.testing import tiny_encoder

    encoder = Encoder(tiny_encoder("bert", vocab_size=len(tiny_tokenizer())), tiny_tokenizer())
    with pytest.raises(ConfigError, match="disagree about the start token"):
        lf.LMVAE(lf.LMVAEConfig(latent_dim=6, max_len=9), encoder=encoder, decoder=with_start("</s>"))


def test_which_token_is_taken_where_there_is_no_start_token_is_said(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    decoder = Decoder(eager("qwen2"), SentenceTokenizer(tokenizer))
    from lmvae_fast.models.memory_start import start_memory
    from lmvae_fast.models.projectors import LinearProjector

    projector = LinearProjector(
        6, layers=decoder.num_layers, kv_heads=decoder.kv_heads, slots=2, head_dim=decoder.head_dim
    )
    config = lf.LMVAEConfig(memory_init="sink", projector="linear")
    start_memory(config, projector, decoder)
    assert "no start token" in caplog.text and "'</s>'" in caplog.text
    caplog.clear()
    start_memory(config.replace(memory_init="random"), projector, decoder)
    assert not caplog.text


# ---- latents of one number, weights that cannot train ----------------------------------------------------------------


@pytest.mark.parametrize("projector", ["linear", "mlp", "adapter"])
def test_a_latent_of_one_number(projector, tmp_path):
    model = make_model("llama", latent_dim=1, memory_init="sink", projector=projector, visibility="prefix", slots=2)
    config = lf.TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, batch_size=4, progress=False, tensorboard=False
    )
    lf.train(model, SENTENCES, SENTENCES[:4], config)
    figures = lf.evaluate(model, SENTENCES[:4], metrics=("elbo", "active_units", "mutual_information", "bleu"))
    assert figures.latent_dim == 1 and torch.isfinite(torch.tensor(figures.elbo))
    assert len(lf.interpolate(model, SENTENCES[0], SENTENCES[1], steps=3).texts) == 3


def test_a_quantised_decoder_does_not_train():
    from lmvae_fast.models.decoder.tuning import Tuning

    model = eager("llama")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    for part in ("lora", "all"):
        with pytest.raises(ConfigError, match=f"decoder_part='{part}' with bitsandbytes.*train_decoder=False"):
            Tuning(part).apply(model)
    model = eager("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(4, 4, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ConfigError, match="up_proj"):
        Tuning("lora").apply(model)
