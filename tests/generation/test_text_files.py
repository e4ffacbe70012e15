"""Latent files in, text files out: in order, resumable at any byte, refused when they do not belong together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError, LatentError, OutputError
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.latent_files import check_latents, read_latents, write_latents
from lmvae_fast.generation.latent_sources import (
    latents_of_file,
    latents_of_prior,
    latents_of_texts,
    read_annotations,
    read_prompts,
)
from lmvae_fast.generation.text_files import BLOCKS_PER_BATCH, generate_file
from lmvae_fast.generation.workers import Workers
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.testing import make_model
from lmvae_fast.text.tokenizer import label_features
from tests.processes import wait_until_gone

N = 50


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", latent_dim=4, max_len=6).eval()


@pytest.fixture
def latents():
    return 2 * torch.randn(N, 4)


def run(model, path, output, config=None, **options):
    return generate_file(model, latents_of_file(path, 4), output, config or GenerationConfig(batch_size=2), **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".jsonl"])
def test_formats_agree(model, latents, tmp_path, suffix):
    path = tmp_path / f"z{suffix}"
    write_latents(path, latents)
    assert check_latents(path, latent_dim=4) == N
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
    with pytest.raises(OutputError, match="nothing says what made it"):
        run(model, tmp_path / "z.npy", output, overwrite=True)
    assert output.read_text() == "mine\n"
    output.unlink()
    run(model, tmp_path / "z.npy", output)
    run(model, tmp_path / "z.npy", output, overwrite=True)
    before = output.read_bytes()
    with pytest.raises(OutputError, match="another generation"):
        run(model, tmp_path / "z.npy", output, GenerationConfig(batch_size=2, max_new_tokens=3))
    other = make_model("gpt2", latent_dim=4, max_len=6, seed=1).eval()
    with pytest.raises(OutputError, match="another model"):
        run(other, tmp_path / "z.npy", output)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.npy", None, DataError, "no file of latents"),
        ("empty.jsonl", b"", DataError, "empty"),
        ("blank.jsonl", b"\n\n", DataError, "no rows"),
        ("z.txt", b"1 2", DataError, "format"),
        ("z.jsonl", b'{"z": [1, 2, 3, 4]}\n{"z": [1, 2]}\n', LatentError, "line 2"),
        ("z.jsonl", b'{"z": [1, 2, 3, 4]}\nnonsense\n', DataError, "line 2"),
        ("z.jsonl", b'{"z": [1, 2, 3, 4]}\n{"y": [1, 2, 3, 4]}\n', DataError, "line 2"),
        ("z.jsonl", b'{"z": [1, 2, 3, 4]}\n\xff\xfe\n', DataError, "line 2"),
        ("z.jsonl", b"[1, 2, 3, 4]\n[1, NaN, 3, 4]\n", LatentError, "row 1"),
        ("z.npy", np.zeros((3, 5)), LatentError, r"\[N, 4\]"),
        ("z.npy", np.zeros(4), LatentError, r"\[N, 4\]"),
        ("z.npy", np.zeros((0, 4)), DataError, "no rows"),
        ("z.npy", np.array([["a"] * 4]), DataError, "no real numbers"),
        ("z.npy", np.array([[0, 0, 0, 0]] * 9000 + [[0, np.inf, 0, 0]]), LatentError, "row 9000"),
        ("z.npy", b"\x93NUMPY", DataError, "truncated"),
    ],
)
def test_a_bad_latent_file_is_refused_before_anything_is_decoded(model, tmp_path, name, content, error, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(error, match=message):
        run(model, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_cut_safetensors_file_is_refused(tmp_path):
    write_latents(tmp_path / "cut.safetensors", torch.zeros(9, 4))
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(DataError, match="truncated"):
        list(read_latents(tmp_path / "cut.safetensors", latent_dim=4))


def test_bad_settings_are_refused_before_anything_is_decoded(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    long = " ".join(["the"] * 9)
    for options, error, message in [
        ({"config": GenerationConfig(do_sample=True)}, ConfigError, "seed"),
        ({"config": GenerationConfig(max_new_tokens=7)}, ConfigError, "max_len=6"),
        ({"prompts": long}, ConfigError, "max_len=6"),
        ({"prompts": ["the"] * (N - 1) + [long]}, ConfigError, "max_len=6"),
        ({"prompts": ["the"] * (N - 1)}, DataError, f"{N - 1}.*{N}"),
        ({"annotations": torch.zeros(N, 2)}, LatentError, "no labels"),
    ]:
        with pytest.raises(error, match=message):
            run(model, tmp_path / "z.npy", tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        run(model, tmp_path / "z.npy", tmp_path / "file" / "out.jsonl")


def test_several_samples_and_a_prompt_continue_too(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    config = GenerationConfig(batch_size=2, do_sample=True, seed=4, num_samples=3, logprobs=True)
    options = {"config": config, "prompts": "the"}
    assert run(model, tmp_path / "z.npy", tmp_path / "whole.jsonl", **options) == 3 * N
    # a block is as many sentences with samples as without: what a stop waits for does not grow with their number
    assert json.loads((tmp_path / "whole.jsonl.meta.json").read_text())["block_size"] == 2 * BLOCKS_PER_BATCH // 3
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(N) for s in range(3)]
    assert all(row["text"].startswith("the") and len(row["logprobs"]) == row["tokens"] for row in rows)
    (tmp_path / "cut.jsonl").write_bytes(whole[: 2 * len(whole) // 3])
    (tmp_path / "cut.jsonl.meta.json").write_text((tmp_path / "whole.jsonl.meta.json").read_text())
    run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", **options)
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    with pytest.raises(OutputError, match="prompt"):
        run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", config=config, prompts="a")


def test_a_prompt_for_each_latent(model, latents, tmp_path):
    """Every sentence has the limit that the longest prompt of the file leaves, whatever stands in its block."""
    write_latents(tmp_path / "z.npy", latents)
    prompts = ["the sun" if row == N - 1 else "a" if row % 3 else "" for row in range(N)]
    run(model, tmp_path / "z.npy", tmp_path / "whole.jsonl", prompts=prompts)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    expected = list(generate(model, latents, GenerationConfig(), prompts=prompts))
    assert [(row["text"], row["tokens"]) for row in rows] == [(out.text, len(out.ids)) for out in expected]
    (tmp_path / "cut.jsonl").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jsonl.meta.json").write_text((tmp_path / "whole.jsonl.meta.json").read_text())
    with pytest.raises(OutputError, match="prompt"):
        run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", prompts=["a", *prompts[1:]])
    run(model, tmp_path / "z.npy", tmp_path / "cut.jsonl", prompts=prompts)
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


def test_annotations_of_a_conditional_decoder(latents, tmp_path):
    conditional = make_model(
        "gpt2", latent_dim=4, max_len=6, annotations=("NOUN", "VERB"), conditional_decoder=True
    ).eval()
    write_latents(tmp_path / "z.npy", latents)
    labels = torch.rand(N, 2)
    output = tmp_path / "whole.jsonl"
    run(conditional, tmp_path / "z.npy", output, annotations=labels)
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts == conditional.decode(latents, annotations=labels)
    assert texts != conditional.decode(latents, annotations=labels.flip(0))
    with pytest.raises(OutputError, match="annotations"):
        run(conditional, tmp_path / "z.npy", output, annotations=labels.flip(0))
    broken = labels.clone()
    broken[7, 1] = float("nan")
    for wrong, message in [
        (None, "needs annotations"),
        (labels[1:], f"{N}, 2"),
        (labels[:, :1], f"{N}, 2"),
        (broken, "row 7"),
    ]:
        with pytest.raises(LatentError, match=message):
            run(conditional, tmp_path / "z.npy", tmp_path / "other.jsonl", annotations=wrong)
    assert not (tmp_path / "other.jsonl").exists()


def test_files_of_prompts_and_annotations(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\nthe sun\n")
    (tmp_path / "p.jsonl").write_text('"a cat"\n{"prompt": ""}\n{"prompt": "the sun"}\n')
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == ["a cat", "", "the sun"]
    for name, content, message in [
        ("p.csv", "a", "format"), ("empty.txt", "", "empty"), ("none.txt", None, "cannot read"),
        ("p.jsonl", '"a"\n{"text": "b"}\n', "line 2"), ("p.jsonl", "3\n", "line 1"),
    ]:  # fmt: skip
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / name)
    labels = ("NOUN", "VERB")
    (tmp_path / "a.txt").write_text("NOUN VERB NOUN\nVERB\n")
    expected = torch.stack([label_features(words, labels, 6) for words in (["NOUN", "VERB", "NOUN"], ["VERB"])])
    torch.testing.assert_close(read_annotations(tmp_path / "a.txt", labels, 6), expected, rtol=0, atol=0)
    np.save(tmp_path / "a.npy", expected.numpy())
    torch.testing.assert_close(read_annotations(tmp_path / "a.npy", labels, 6), expected, rtol=0, atol=0)
    (tmp_path / "a.txt").write_text("NOUN\nADV\n")
    with pytest.raises(DataError, match=r"sentence 1 .*ADV"):
        read_annotations(tmp_path / "a.txt", labels, 6)
    with pytest.raises(LatentError, match="no labels"):
        read_annotations(tmp_path / "a.txt", (), 6)
    (tmp_path / "a.jsonl").write_text('{"annotations": [0.5, NaN]}\n')
    with pytest.raises(LatentError, match="row 0"):
        read_annotations(tmp_path / "a.jsonl", labels, 6)


def test_a_latent_of_the_prior_depends_on_its_row_only():
    source = latents_of_prior(11, 5, seed=3)
    whole = torch.cat(list(source.read(11, 0)))
    for block, skip in ((3, 0), (4, 6), (1, 10)):
        torch.testing.assert_close(torch.cat(list(source.read(block, skip))), whole[skip:], rtol=1e-6, atol=1e-7)
    assert not torch.equal(whole, torch.cat(list(latents_of_prior(11, 5, seed=4).read(11, 0))))
    with pytest.raises(ConfigError, match="at least one"):
        latents_of_prior(0, 5, seed=3)


def test_sentences_are_encoded_as_they_are_read(model, tmp_path, monkeypatch):
    sentences = [f"{who} {what}" for who in ("cats", "the sun", "a stone", "dogs") for what in ("sleep", "warm", "are")]
    (tmp_path / "texts.txt").write_text("\n".join(sentences))
    config, output, asked = GenerationConfig(batch_size=1), tmp_path / "out.jsonl", []
    generate_file(model, latents_of_texts(model, tmp_path / "texts.txt"), output, config)
    whole = output.read_bytes()
    assert [json.loads(line)["text"] for line in whole.splitlines()] == model.decode(model.encode(sentences).mu)
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:9]))
    encode = type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, rows: asked.extend(rows) or encode(self, rows))
    generate_file(model, latents_of_texts(model, tmp_path / "texts.txt"), output, config)
    assert output.read_bytes() == whole
    assert [example.text for example in asked] == sentences[8:]  # behind a block of 8


def test_one_run_at_a_time_writes(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)

    def again(sentences, tokens):
        with pytest.raises(OutputError, match="another run"):
            run(model, tmp_path / "z.npy", tmp_path / "out.jsonl")

    run(model, tmp_path / "z.npy", tmp_path / "out.jsonl", progress=again)
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == N


ORPHANS = """
import sys, time
from lmvae_fast.generation.workers import Workers
from tests.generation.test_text_files import from_folder
if __name__ == "__main__":
    workers = Workers(from_folder, sys.argv[1], 2)
    workers._pool.submit(int).result()
    print(*workers._pool._processes, flush=True)
    time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(model, tmp_path):
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    (tmp_path / "parent.py").write_text(ORPHANS)
    root = Path(__file__).resolve().parents[2]
    command, environment = (
        [sys.executable, tmp_path / "parent.py", tmp_path / "model"],
        os.environ | {"PYTHONPATH": str(root)},
    )
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(number) for number in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    wait_until_gone(*workers)


def from_folder(source, device):
    return LMVAE.from_pretrained(source).to(device)


def test_workers_write_the_same_file_also_after_one_has_died(model, tmp_path):
    total = 400
    write_latents(tmp_path / "z.npy", 2 * torch.randn(total, 4))
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    options = {"prompts": ["the" if row % 2 else "" for row in range(total)]}
    run(model, tmp_path / "z.npy", tmp_path / "one.jsonl", **options)
    output, seen = tmp_path / "two.jsonl", []

    def kill_one(sentences, tokens):
        seen.append((sentences, tokens))
        if len(seen) == 1:
            os.kill(next(iter(workers._pool._processes)), signal.SIGKILL)

    with (
        Workers(from_folder, str(tmp_path / "model"), 2) as workers,
        pytest.raises(OutputError, match="worker process"),
    ):
        run(model, tmp_path / "z.npy", output, workers=workers, progress=kill_one, **options)
    written = output.read_bytes().count(b"\n")
    assert 0 < written < total
    seen.clear()
    with Workers(from_folder, str(tmp_path / "model"), 2) as workers:
        run(model, tmp_path / "z.npy", output, workers=workers, progress=lambda *found: seen.append(found), **options)
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert seen[0] == (written, None) and len(seen) == 1 + total - written
    with pytest.raises(ConfigError, match="workers"):
        Workers(from_folder, str(tmp_path / "model"), 0)


def test_blocks_that_were_changed_are_found(model, latents, tmp_path):
    """Their number and lines are as they were, one letter is not."""
    write_latents(tmp_path / "z.npy", latents)
    output = tmp_path / "out.jsonl"
    run(model, tmp_path / "z.npy", output)
    whole = output.read_bytes()
    output.write_bytes(whole.replace(b'"finished": ', b'"Finished": ', 1))
    with pytest.raises(OutputError, match=r"block 1 .* is not what was written"):
        run(model, tmp_path / "z.npy", output)
    run(model, tmp_path / "z.npy", output, overwrite=True)
    assert output.read_bytes() == whole
    hashes = tmp_path / "out.jsonl.blocks"
    recorded = hashes.read_text()
    assert recorded.count("\n") == -(-N // 16)
    hashes.write_text("".join(recorded.splitlines(keepends=True)[:2]))  # killed between a block and its hash
    run(model, tmp_path / "z.npy", output)
    assert (output.read_bytes(), hashes.read_text()) == (whole, recorded)


def test_an_output_removed_meanwhile_is_an_error(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "out.jsonl"

    def remove(sentences, tokens):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(OutputError, match="was removed or replaced"):
        run(model, tmp_path / "z.npy", output, progress=remove)
    assert not output.exists()


def test_a_run_that_is_asked_to_stop_ends_behind_a_block(model, latents, tmp_path):
    write_latents(tmp_path / "z.npy", latents)
    output = tmp_path / "out.jsonl"
    assert run(model, tmp_path / "z.npy", output, stop=lambda: True) == 16 == output.read_bytes().count(b"\n")
    assert run(model, tmp_path / "z.npy", output) == N
    run(model, tmp_path / "z.npy", tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
