"""The studies of definitions and of penalties on tiny models: their records, their tables, and going on after a stop."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.common import records
from benchmarks.science import definitions, from_word_vectors, penalties, study_tables
from lmvae_fast.testing import make_model, tiny_decoder, tiny_encoder, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with tiny models, whose `results` the studies write their records to."""
    tokenizer = tiny_tokenizer()
    for name, model in (("encoder", tiny_encoder("bert", vocab_size=len(tokenizer))),
                        ("decoder", tiny_decoder("llama", vocab_size=len(tokenizer)))):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for module in (records, definitions, from_word_vectors, penalties, study_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, module, *options):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
    assert module.main() == 0


def test_definitions(folder, monkeypatch):
    words = [f"w{number}" for number in range(40)]
    rows = [f"{word}\ta cat {'sat' if number % 2 else 'is an animal'}" for number, word in enumerate(words)]
    (folder / "definitions.tsv").write_text("\n".join(["word\tdefinition", *rows]) + "\n")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 6, generator=generator).tolist()
    lines = [" ".join([word, *map(str, row)]) for word, row in zip(words, vectors, strict=True)]
    (folder / "vectors.txt").write_text("\n".join(lines) + "\n")
    data = ("--data", "definitions.tsv", "--vectors", "vectors.txt", "--words", 30)
    call(monkeypatch, definitions, *data, "--write-parts", "parts")
    train = (folder / "parts" / "train.tsv").read_text().splitlines()
    assert train[0] == "word\tdefinition" and len(train) == 25

    vae = make_model("llama", system="llamavae", projector="mlp")
    with torch.no_grad():
        vae.posterior_head.weight.mul_(50.0)  # posteriors that differ: a collapsed VAE is refused
    vae.save_pretrained("vae", include_frozen=True)
    one = ("--kinds", "allinone", "--blocks", 1, "--hidden", 4, "--permutations", "hard", "--seeds", 0)
    grid = (*data, "--model", "vae", *one, "--epochs", 1, "--text-words", 2)
    call(monkeypatch, definitions, *grid)
    file = folder / "results" / "science" / "definitions.json"
    first = json.loads(file.read_text())
    assert [fit["fitted_to"] for fit in first["fits"]] == ["train", "all"]
    assert {"nll", "gloss_nats", "encoder_cosine", "sense_bleu_standard"} <= first["fits"][0]["test"].keys()
    call(monkeypatch, definitions, *grid)  # all is done
    assert json.loads(file.read_text())["fits"] == first["fits"]

    (folder / "recipe.json").write_text(
        json.dumps({
            "model": {"system": "llamavae", "encoder": "encoder", "decoder": "decoder", "projector": "mlp", "latent_dim": 6,
                      "max_len": 9},
            "train": {"batch_size": 4, "max_steps": 2},
        })
    )  # fmt: skip
    call(monkeypatch, from_word_vectors, "recipe.json", *data, "--text-words", 2)
    table = study_tables.definition_ways()
    for way in ("Flow(tr)", "Flow(all)", "no flow", "drawn from the prior"):
        assert way in table
    assert "| allinone | 1 | 4 | hard |" in study_tables.definition_flows()


def test_a_flow_that_diverges_is_a_finding(folder, monkeypatch):
    row = {"fitted_to": "train", "blocks": 1, "hidden": 4, "permutation": "hard", "seed": 0, "parameters": 10}
    test = dict.fromkeys(
        ("nll", "encoder_cosine", "sense_bleu_standard", "gloss_nats", "sense_bleu_codwoe", "lemma_bleu_codwoe"), 1.0
    )
    done = {**row, "kind": "glow", "test": test, "steps": 3, "seconds_per_step": 0.01}
    record = {
        "command": "c",
        "machine": records_machine(),
        "fits": [{**row, "kind": "coupling", "diverged_at": 8}, done],
    }
    (folder / "results" / "science").mkdir(parents=True)
    (folder / "results" / "science" / "definitions.json").write_text(json.dumps({**record, "prior": test}))
    lines = study_tables.definition_flows().splitlines()
    assert "diverged at step 8" in lines[3] and "glow" in lines[2]


def records_machine():
    from lmvae_fast.profiling.measure import machine

    return machine("cpu")


def test_penalties(folder, monkeypatch):
    pairs = [
        {"prompt": f"a cat {word}", "response": "dogs eat"} for word in ("sat", "is", "an", "animal", "of", "kind")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    common = ("--decoder", "decoder", "--max-len", 6, "--max-prompt-len", 6)
    call(monkeypatch, penalties, "pairs.jsonl", *common, "--prepare", "parts", "--prompts", 3, 2)
    parts = {name: (folder / "parts" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test", "rest")}
    assert {name: len(lines) for name, lines in parts.items()} == {"train": 3, "test": 2, "rest": 1}

    said = ("dogs eat", "a cat sat", "an animal is", "a kind of cat")
    for name in ("train", "test"):
        prompts = [json.loads(line)["prompt"] for line in parts[name]]
        answers = [json.dumps({"prompt": prompt, "response": text}) for prompt in prompts for text in said]
        (folder / "parts" / f"{name}-answers.jsonl").write_text("\n".join(answers) + "\n")
    run = ("parts", *common, "--name", "tiny", "--embed", "encoder", "--steps", 2, "--responses", 4, "--seeds", 0, 1)
    call(monkeypatch, penalties, *run, "--only", "DG-VAE+gskip", "BOW-VAE+none")
    record = json.loads((folder / "results" / "science" / "penalties" / "tiny.json").read_text())
    made = [(row["penalty"], row["residual"], row["seed"]) for row in record["runs"]]
    assert made == [("DG-VAE", "gskip", 0), ("DG-VAE", "gskip", 1), ("BOW-VAE", "none", 0)]
    figures = record["runs"][0]["figures"]
    assert {"kl", "mutual_information", "active_units_0.03", "prior_mauve", "posterior_rouge_lsum"} <= figures.keys()
    for figures in (study_tables.TABLES["penalties-latent"](), study_tables.TABLES["penalties-texts"]()):
        assert "| DG-VAE + gskip |" in figures and "| BOW-VAE |" in figures and " +- " in figures
