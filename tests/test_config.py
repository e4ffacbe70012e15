"""Configurations: files in and out, unknown and contradictory fields."""

from __future__ import annotations

import pytest

from lmvae_fast.config import GenerationConfig, LMVAEConfig, TrainConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.models.systems import resolve


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize(
    "config",
    [
        LMVAEConfig(annotations=("ARG0", "V"), conditional_decoder=True, kl_target=0.5),
        TrainConfig(adam_betas=(0.8, 0.95), max_steps=7, resume="somewhere"),
        GenerationConfig(do_sample=True, top_p=0.9, seed=3),
    ],
)
def test_files_round_trip(tmp_path, suffix, config):
    config.to_file(tmp_path / f"c{suffix}")
    assert type(config).from_file(tmp_path / f"c{suffix}") == config
    assert hash(config) == hash(type(config).from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LMVAEConfig.from_dict({"latentdim": 3}), "latent_dim"),
        (lambda: LMVAEConfig(system="langva"), "langvae"),
        (lambda: LMVAEConfig(visibility="all"), "prefix, rolling, interleaved"),
        (lambda: LMVAEConfig(pooling="max"), "mean"),
        (lambda: LMVAEConfig(dtype="fp32"), "float32"),
        (lambda: LMVAEConfig(latent_dim=0), ">= 1"),
        (lambda: LMVAEConfig(latent_dim=2.5), "integer"),
        (lambda: LMVAEConfig(latent_dim=True), "integer"),
        (lambda: LMVAEConfig(projector_dropout=1.0), "0.999"),
        (lambda: LMVAEConfig(kl_target=float("nan")), "finite"),
        (lambda: LMVAEConfig(visibility="rolling", slots=4, max_len=9), "slots >= 9"),
        (lambda: LMVAEConfig(projector="none", embedding_shift=False), "no way into"),
        (lambda: LMVAEConfig(projector="linear", projector_hidden=4), "mlp"),
        (lambda: LMVAEConfig(conditional_decoder=True), "annotations"),
        (lambda: LMVAEConfig(annotations=("A", "A")), "repeat"),
        (lambda: LMVAEConfig(encoder=""), "encoder"),
        (lambda: LMVAEConfig(train_encoder="false"), "true or false"),
        (lambda: LMVAEConfig(conditional_decoder=None), "true or false"),
        (lambda: LMVAEConfig(objective="langvae-0.6", length_normalize=True), "length weighting"),
        (lambda: LMVAEConfig.from_dict({1: 2}), "unknown"),
        (lambda: TrainConfig(adam_betas=0.9), "two numbers"),
        (lambda: TrainConfig(adam_betas=("a", "b")), "two numbers"),
        (lambda: TrainConfig(output_dir=3), "output_dir"),
        (lambda: TrainConfig(resume=3), "resume"),
        (lambda: TrainConfig(tensorboard="no"), "true or false"),
        (lambda: GenerationConfig(do_sample="yes"), "true or false"),
        (lambda: TrainConfig(beta_zero=0.7, beta_increase=0.5), "sum <= 1"),
        (lambda: TrainConfig(learning_rate=0.0), "> 0"),
        (lambda: TrainConfig(adam_betas=(0.9, 1.0)), "adam_betas"),
        (lambda: TrainConfig(schedule="step"), "plateau"),
        (lambda: GenerationConfig(do_sample=True, top_p=0.0), "top_p"),
        (lambda: GenerationConfig(do_sample=True, temperature=0.0), "temperature"),
        (lambda: GenerationConfig(temperature=0.5), "do_sample"),
        (lambda: GenerationConfig(top_k=-1), "top_k"),
    ],
)
def test_bad_values_name_the_limit(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "mapping"), ("{a: [", "valid"), ("nofield: 1", "nofield"), (None, "cannot read")]
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        LMVAEConfig.from_file(path)


def test_presets_fill_open_fields_only():
    full = resolve(LMVAEConfig(system="langvae", kl_mode="sum"))
    assert (full.visibility, full.slots, full.kl_mode, full.projector_dropout) == ("rolling", 33, "sum", 0.1)
    full = resolve(LMVAEConfig(system="optimus"))
    assert (full.visibility, full.slots, full.projector, full.train_decoder) == ("prefix", 1, "shared", True)
    full = resolve(LMVAEConfig(encoder="intfloat/multilingual-e5-large-instruct"))
    assert full.normalize is True
    assert resolve(LMVAEConfig(encoder="intfloat/multilingual-e5-large-instruct", normalize=False)).normalize is False
    assert resolve(LMVAEConfig(visibility="prefix", slots=4)).slots == 4
    assert resolve(LMVAEConfig(projector="mlp", latent_dim=8)).projector_hidden == 32
    assert resolve(full) == full


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", ".1e-2", "0.001"])
def test_yaml_reads_every_way_to_write_a_number(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(f"learning_rate: {text}\noutput_dir: 1e-3run\n")
    config = TrainConfig.from_file(file)
    assert config.learning_rate == 1e-3
    assert config.output_dir == "1e-3run"


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        TrainConfig().to_file(tmp_path / "nowhere" / "c.json")
