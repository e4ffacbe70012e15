"""A recipe's record: points over CPU time, figures at the end, and the same command after a stop."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.common import records
from benchmarks.science import probed, recipe, tables
from lmvae_fast.testing import SENTENCES, tiny_decoder, tiny_encoder, tiny_tokenizer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the recipe of tiny models with further options and returns its record."""
    tokenizer = tiny_tokenizer()
    for name, model in (("encoder", tiny_encoder("bert", vocab_size=len(tokenizer))),
                        ("decoder", tiny_decoder("llama", vocab_size=len(tokenizer)))):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    fields = {
        "model": {"system": "lmvae", "encoder": str(tmp_path / "encoder"), "decoder": str(tmp_path / "decoder"),
                  "latent_dim": 4, "max_len": 9, "lora_rank": 2},
        "train": {"batch_size": 4, "max_steps": 40, "save_every": 1, "precision": "bf16"},
        "data": {"held_out": 0.4},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results" / "science")
    monkeypatch.setattr(probed, "RESULTS", tmp_path / "results" / "science")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")

    def call(*options):
        arguments = [
            tmp_path / "tiny.yaml",
            "--data",
            tmp_path / "sentences.txt",
            "--runs",
            tmp_path / "runs",
            *options,
        ]
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
        assert recipe.main() == 0
        return json.loads((tmp_path / "results" / "science" / "tiny.json").read_text())

    return call


def test_a_recipe_is_recorded_and_goes_on(run):
    minutes = 1e-4  # passed before the first step is done
    record = run("--minutes", minutes, "--marks", 1, "--held-out", 4, "--final", 5)
    assert len(record["points"]) == 1 and record["points"][0]["step"] == 1
    assert {"bleu", "reconstruction", "kl", "active_units", "cpu_minutes"} <= record["points"][0].keys()
    assert record["points"][0]["cpu_minutes"] > minutes and record["final"]["sentences"] == 5
    assert {"machine", "command", "seed"} <= record.keys() and record["machine"]["commit"]
    again = run("--minutes", minutes, "--marks", 1, "--held-out", 4, "--final", 5)
    assert again["points"] == record["points"] and again["final"]["steps"] == 1  # it had had its minutes
    assert again["final"]["reconstruction"] == pytest.approx(record["final"]["reconstruction"], rel=1e-5)
    table = tables.recipes()
    assert table.count("| tiny |") == 2 and record["command"] in table


def test_a_trained_recipe_is_probed(run, tmp_path, monkeypatch):
    run("--minutes", 1e-4, "--marks", 1, "--held-out", 4, "--final", 5)
    (tmp_path / "results" / "science" / "latent_size").mkdir()
    (tmp_path / "runs" / "latent_size").mkdir()
    (tmp_path / "results" / "science" / "tiny.json").rename(tmp_path / "results" / "science" / "latent_size" / "4.json")
    (tmp_path / "runs" / "tiny").rename(tmp_path / "runs" / "latent_size" / "4")
    labelled = [
        f"{text} & {' '.join('ABC'[place % 3] for place in range(len(text.split())))}" for text in SENTENCES * 3
    ]
    (tmp_path / "labelled.txt").write_text("\n".join(labelled))
    arguments = (
        "latent_size/4", "--data", tmp_path / "labelled.txt", "--runs", tmp_path / "runs", "--vectors", "encoder",
        "--decoded", 5, "--probes", "overview,reconstruction", "--draw",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["probed", *map(str, arguments)])
    assert probed.main() == 0
    record = json.loads((tmp_path / "results" / "science" / "probes" / "latent_size" / "4.json").read_text())
    assert record["figures"]["overview"]["active_units"]["choices"]["of"] == 4 and record["trained_by"]
    assert record["fluency"]["ratio"] == pytest.approx(record["fluency"]["middle"] / record["fluency"]["ends"])
    assert record["fluency"]["sentences"] > 1.0 and (tmp_path / "runs" / "latent_size" / "4" / "probes.html").is_file()
    assert "<svg" in (tmp_path / "results" / "science" / "latent_size.svg").read_text()
    table = tables.probed("latent_size")
    assert "| BLEU of reconstruction |" in table and "MIG" not in table and record["command"] in table


def test_a_run_ends_at_the_steps_of_a_record(run):
    record = run("--minutes", 60, "--marks", 1, "--steps", 3, "--held-out", 4, "--final", 5)
    assert record["final"]["steps"] == 3


@pytest.mark.parametrize("file", sorted(Path("examples/recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_command_in_a_recipe_is_its_records(file):
    lines = file.read_text().splitlines()
    (named,) = re.findall(r"record: (\S+\.json)", lines[0])
    (said,) = (line for line in lines if "benchmarks.science.recipe" in line)
    command = json.loads(Path(named).read_text())["command"].split()
    given = said.removeprefix("#").split()
    if "--data" in given:  # a folder of one's own
        place = given.index("--data") + 1
        command[place] = Path(command[place]).name
    assert given == command
