"""The command line on tiny models: every command, its JSON, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lmvae_fast.cli.common import merged
from lmvae_fast.cli.explore import parse_dims
from lmvae_fast.errors import ConfigError
from lmvae_fast.generation.latent_files import write_latents
from lmvae_fast.testing import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    make_model("gpt2", latent_dim=4, max_len=12).save_pretrained(path)
    return path


def call(capsys, *arguments, code=0):
    """Run the application in this process: (standard output, standard error)."""
    from lmvae_fast.cli.app import main

    before, sys.argv = sys.argv, ["lmvae-fast", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_info:
            main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    assert (exit_info.value.code or 0) == code, captured.err
    return captured.out, captured.err


def as_json(capsys, *arguments):
    return json.loads(call(capsys, *arguments, "--json")[0])


def test_help_teaches(capsys):
    out, _ = call(capsys, "--help")
    for command in ("demo", "train", "generate", "interpolate", "traverse", "eval", "env", "convert"):
        assert command in out
        assert "--help" in call(capsys, command, "--help")[0]
    assert "Example" in call(capsys, "train", "--help")[0]


def test_env(capsys):
    found = as_json(capsys, "env")
    ops = {row["op"] for row in found["ops"]}
    assert {"posterior_sample", "latent_kv", "latent_attention", "lm_head_loss", "coupling_flow"} <= ops
    for op in ops:
        assert sum(row["chosen"] for row in found["ops"] if row["op"] == op) == 1
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert all(row["reason"] for row in found["ops"])


def test_explore(capsys, folder):
    way = as_json(capsys, "interpolate", folder, "a cat eats", "water boils", "--steps", "4")
    assert [round(point["weight"], 2) for point in way] == [0.0, 0.33, 0.67, 1.0]
    out = as_json(capsys, "traverse", folder, "a cat eats", "--dims", "0,2-3", "--steps", "3")
    assert out["dims"] == [0, 2, 3] and [len(row) for row in out["texts"]] == [3, 3, 3]
    out = as_json(capsys, "arithmetic", folder, "a cat eats - water boils")
    assert out["terms"] == [[1.0, "a cat eats"], [-1.0, "water boils"]] and len(out["latent"]) == 4
    assert "weight" in call(capsys, "interpolate", folder, "a cat eats", "water boils")[0]


def test_generate_to_a_file_and_again(capsys, folder, tmp_path):
    write_latents(tmp_path / "z.npy", torch.randn(9, 4))
    output = tmp_path / "out.jsonl"
    done = as_json(capsys, "generate", folder, "--latents", tmp_path / "z.npy", "--output", output, "--batch-size", "2")
    assert done["sentences"] == 9
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    err = call(capsys, "generate", folder, "--latents", tmp_path / "z.npy", "--output", output, "--batch-size", "2")[1]
    assert output.read_bytes() == whole and "9/9" in err and "sentence/s" in err and "tokens/s" in err
    rows = as_json(capsys, "generate", folder, "--latents", tmp_path / "z.npy")
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in whole.splitlines()]


def test_generate_from_the_prior_is_one_stream(capsys, folder, tmp_path):
    for size, name, batch in ((5, "a.txt", 64), (5, "b.txt", 64), (25, "more.txt", 2)):
        call(capsys, "generate", folder, "--prior", size, "--output", tmp_path / name, "--seed", "3", "--sample",
             "--batch-size", batch)  # fmt: skip
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text()
    texts = (tmp_path / "more.txt").read_text().splitlines()
    assert texts[:5] == (tmp_path / "a.txt").read_text().splitlines() and len(texts) == 25


def test_generate_with_prompts_and_annotations(capsys, tmp_path):
    make_model(
        "gpt2", latent_dim=4, max_len=12, annotations=("NOUN", "VERB"), conditional_decoder=True
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the\n\nthe sun\n")
    (tmp_path / "labels.txt").write_text("NOUN VERB\nVERB\nNOUN NOUN\n")
    (tmp_path / "labelled.srl").write_text("the sun & NOUN VERB\na cat eats & NOUN NOUN VERB\n")
    conditions = ["--prompts", tmp_path / "prompts.txt", "--annotations", tmp_path / "labels.txt"]
    rows = as_json(capsys, "generate", tmp_path / "model", "--prior", "3", *conditions)
    assert rows[0]["text"].startswith("the") and rows[2]["text"].startswith("the sun")
    output = tmp_path / "out.jsonl"
    call(capsys, "generate", tmp_path / "model", "--prior", "3", *conditions, "--output", output)
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [row["text"] for row in rows]
    err = call(capsys, "generate", tmp_path / "model", "--prior", "3", *conditions[2:], "--output", output, code=3)[1]
    assert "another prompt" in err
    # sentences with labels bring their annotations along
    assert len(as_json(capsys, "generate", tmp_path / "model", "--texts", tmp_path / "labelled.srl")) == 2
    for count, arguments, message in [
        ("3", [], "needs annotations"),
        ("3", ["--prompts", tmp_path / "labelled.srl"], "format"),
        ("3", [*conditions, "--prompt", "a"], "one source of prompts"),
        ("2", conditions, "do not fit the latents"),
    ]:
        assert message in call(capsys, "generate", tmp_path / "model", "--prior", count, *arguments, code=3)[1]


def test_train_eval_and_resume(capsys, folder, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text(
        "".join(f"a {animal} eats {food}\n" for animal in ("cat", "dog", "bee") for food in ("meat", "corn"))
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{encoder: {folder}/encoder, decoder: {folder}/decoder, latent_dim: 3, max_len: 14}}\n"
        f"train: {{batch_size: 2, tensorboard: false, log_every: 1}}\ndata: {{path: {data}}}\n"
    )
    run = tmp_path / "run"
    out = as_json(
        capsys, "train", "--config", config, "--output", run, "--max-steps", "2", "--set", "train.grad_clip=0.5"
    )
    assert out["step"] == 2 and out["stopped"] == "completed"
    out = as_json(capsys, "train", "--config", config, "--output", run, "--max-steps", "2", "--resume",
                  "--set", "train.grad_clip=0.5")  # fmt: skip
    assert out["step"] == 2
    figures = as_json(capsys, "eval", run, data)
    assert {"elbo", "kl", "bleu", "active_units"} <= set(figures)
    assert call(capsys, "generate", run, "--prior", "2")[0].count("\n") >= 2


def test_convert_there_and_back(capsys, folder, tmp_path):
    there = as_json(capsys, "convert", folder, tmp_path / "langvae", "--to", "langvae")
    assert there["format"] == "langvae" and (tmp_path / "langvae" / "decoder.pt").is_file()
    call(capsys, "convert", tmp_path / "langvae", tmp_path / "back")
    first = as_json(capsys, "interpolate", folder, "a cat eats", "water boils")
    assert as_json(capsys, "interpolate", tmp_path / "back", "a cat eats", "water boils") == first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "/nowhere", "--prior", "2"], 3, "remedy"),
        (["generate", "MODEL"], 3, "one source"),
        (["generate", "MODEL", "--latents", "none.npy"], 3, "none.npy"),
        (["generate", "MODEL", "--prior", "2", "--max-new-tokens", "99"], 3, "max_len=12"),
        (["generate", "MODEL", "--prior", "2", "--sample", "--top-p", "1.5"], 3, "top_p"),
        (["traverse", "MODEL", "a cat", "--dims", "9"], 3, "0 to 3"),
        (["train", "--data", "missing.txt"], 3, "missing.txt"),
        (["train"], 3, "--data"),
        (["train", "--data", "corpus", "--set", "train.epoch=3"], 3, "epochs"),
        (["generate", "MODEL", "--prior", "2", "--backend", "cuda"], 3, "cuda"),
        (["generate", "MODEL", "--prior", "2", "--backend", "fast"], 2, "reference"),
        (["train", "--data", "corpus", "--set", "train.beta=["], 3, "YAML"),
        (["convert", "MODEL", "MODEL"], 3, "exists"),
        (["convert", "MODEL", "elsewhere", "--decoder", "gpt2"], 3, "LangVAE"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_has_an_exit_code_and_a_remedy(capsys, folder, arguments, code, message):
    arguments = [str(folder) if argument == "MODEL" else argument for argument in arguments]
    out, err = call(capsys, *arguments, code=code)
    assert message in err.replace("\n", "") or message in err
    assert "Traceback" not in err + out


def test_an_unknown_backend_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("LMVAE_BACKEND", "fast")
    assert "LMVAE_BACKEND" in call(capsys, "env", code=3)[1]


def test_errors_are_json_too(capsys, folder):
    _, err = call(capsys, "traverse", folder, "a cat", "--dims", "9", "--json", code=3)
    assert json.loads(err.splitlines()[-1])["error"] == "LatentError"


def test_dims_and_merging(tmp_path):
    assert parse_dims("0,3,5-7") == [0, 3, 5, 6, 7]
    with pytest.raises(ConfigError):
        parse_dims("a")
    file = tmp_path / "c.yaml"
    file.write_text("train: {epochs: 3, seed: 1}\n")
    values = merged(file, ("model", "train"), {"train": {"epochs": 5, "seed": None}}, ["train.beta=0.5"])
    assert values == {"model": {}, "train": {"epochs": 5, "seed": 1, "beta": 0.5}}
    for bad in (["beta=1"], ["train.beta"], ["other.beta=1"]):
        with pytest.raises(ConfigError, match="section"):
            merged(None, ("train",), {}, bad)
    file.write_text("training: {epochs: 3}\n")
    with pytest.raises(ConfigError, match="training"):
        merged(file, ("train",), {}, [])


def test_the_command_is_installed_and_quick_to_help():
    done = subprocess.run(
        [sys.executable, "-m", "lmvae_fast.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"
