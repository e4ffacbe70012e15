"""Latent files in, text files out: in order, resumable at any byte, refused when they do not belong together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError, LatentError, OutputError
from lmvae_fast.generation.latent_files import count_latents, read_latents, write_latents
from lmvae_fast.generation.stream import generate_file
from lmvae_fast.generation.workers import Workers
from lmvae_fast.models.lmvae import LMVAE
from tests.models.tiny import make_model

N = 50


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", latent_dim=4, max_len=6).eval()


@pytest.fixture
def latents():
    return 2 * torch.randn(N, 4)


def run(model, path, output, config=None, **options):
    def blocks(block, skip):
        return read_latents(path, latent_dim=4, block=block, skip=skip)

    config = config or GenerationConfig(batch_size=2)
    return generate_file(model, blocks, output, config, source="x", total=count_latents(path), **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".jsonl"])
def test_formats_agree(model, latents, tmp_path, suffix):
    path = tmp_path / f"z{suffix}"
    write_latents(path, latents)
    assert count_latents(path) == N
    torch.testing.assert_close(torch.cat(list(read_latents(path, latent_dim=4, block=7))), latents)
    torch.testing.assert_close(torch.cat(list(read_latents(path, latent_dim=4, block=7, skip=33))), latents[33:])
    assert run(model, path, tmp_path / "out.jsonl") == N
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(N))
    assert [row["text"] for row in rows] == model.decode(latents)


@pytest.mark.parametrize("draw", [{}, {"do_sample": True, "seed": 4}])
def test_a_run_cut_at_any_byte_continues_to_the_same_file(model, latents, tmp_path, draw):
    write_latents(tmp_path / "z.npy", latents)
    config = GenerationConfig(batch_size=2, **draw)
    run(model, tmp_path / "z.npy", tmp_path / "whole.jsonl", config)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        output = tmp_path / f"cut{cut}.jsonl"
        output.write_bytes(whole[:cut])
        meta = tmp_path / f"cut{cut}.jsonl.meta.json"
        meta.write_bytes((tmp_path / "whole.jsonl.meta.json").read_bytes())
        assert run(model, tmp_path / "z.npy", output, config) == N
        assert output.read_bytes() == whole


def test_a_foreign_output_is_refused_and_left_alone(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(OutputError, match="nothing says what made it"):
        run(model, tmp_path / "z.npy", output)
    assert output.read_text() == "mine\n"
    run(model, tmp_path / "z.npy", output, overwrite=True)
    before = output.read_bytes()
    with pytest.raises(OutputError, match="another generation"):
        run(model, tmp_path / "z.npy", output, GenerationConfig(batch_size=2, max_new_tokens=3))
    other = make_model("gpt2", latent_dim=4, max_len=6, seed=1).eval()
    with pytest.raises(OutputError, match="another model"):
        run(other, tmp_path / "z.npy", output)
    assert output.read_bytes() == before


def test_bad_files(model, tmp_path):
    with pytest.raises(DataError, match="no latent file"):
        count_latents(tmp_path / "none.npy")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        count_latents(tmp_path / "empty.jsonl")
    (tmp_path / "z.txt").write_text("1 2")
    with pytest.raises(DataError, match="format"):
        count_latents(tmp_path / "z.txt")
    (tmp_path / "z.jsonl").write_text('{"z": [1, 2, 3, 4]}\n{"z": [1, 2]}\n')
    with pytest.raises(LatentError, match="line 2"):
        list(read_latents(tmp_path / "z.jsonl", latent_dim=4))
    (tmp_path / "z.jsonl").write_text('{"z": [1, 2, 3, 4]}\nnonsense\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_latents(tmp_path / "z.jsonl", latent_dim=4))
    np.save(tmp_path / "w.npy", np.zeros((3, 5)))
    with pytest.raises(LatentError, match=r"\[N, 4\]"):
        list(read_latents(tmp_path / "w.npy", latent_dim=4))
    write_latents(tmp_path / "cut.safetensors", torch.zeros(9, 4))
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(DataError, match="truncated"):
        list(read_latents(tmp_path / "cut.safetensors", latent_dim=4))
    with pytest.raises(ConfigError, match="seed"):
        run(model, tmp_path / "w.npy", tmp_path / "o.jsonl", GenerationConfig(do_sample=True))


def test_several_samples_and_a_prompt_continue_too(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    config = GenerationConfig(batch_size=2, do_sample=True, seed=4, num_samples=3, logprobs=True)
    options = {"config": config, "prompt": "the"}
    assert run(model, tmp_path / "z.npy", tmp_path / "whole.jsonl", **options) == 3 * N
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(N) for s in range(3)]
    assert all(row["text"].startswith("the") and len(row["logprobs"]) == row["tokens"] for row in rows)
    (tmp_path / "cut.jsonl").write_bytes(whole[: 2 * len(whole) // 3])
    (tmp_path / "cut.jsonl.meta.json").write_text((tmp_path / "whole.jsonl.meta.json").read_text())
    run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", **options)
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    with pytest.raises(OutputError, match="prompt"):
        run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", config=config, prompt="a")


def from_folder(source, device):
    return LMVAE.from_pretrained(source).to(device)


def test_workers_write_the_same_file(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    run(model, tmp_path / "z.npy", tmp_path / "one.jsonl")
    with Workers(from_folder, str(tmp_path / "model"), 2) as workers:
        run(model, tmp_path / "z.npy", tmp_path / "two.jsonl", workers=workers)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="workers"):
        Workers(from_folder, str(tmp_path / "model"), 0)
