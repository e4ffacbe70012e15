"""``fit-flow``, ``define`` and ``eval --definitions`` on a tiny model; the recipe of ``train --system llamavae``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmvae_fast.cli.train import with_recipe
from lmvae_fast.data import WordVectors
from lmvae_fast.testing import SENTENCES, make_model
from tests.cli.test_cli import as_json, call

WORDS = [f"word{i}" for i in range(20)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, definitions (the last word without a vector), word vectors, and a fitted flow."""
    folder = tmp_path_factory.mktemp("definitions")
    model = make_model(max_len=12)
    model.posterior_head.weight.data.mul_(3)
    model.save_pretrained(folder / "vae", include_frozen=True)
    rows = [
        f"{word}\t{'nv'[i % 2]}\t{SENTENCES[(i + k) % 8]}" for i, word in enumerate(WORDS) for k in range(1 + i % 2)
    ]
    (folder / "definitions.tsv").write_text("\n".join(["lemma\tpos\tdefinition", *rows]) + "\n")
    vectors = np.random.default_rng(0).normal(size=(19, 9)).astype(np.float32)
    WordVectors(WORDS[:-1], vectors).save(folder / "vectors.safetensors")
    return folder


FIT = ("--blocks", "2", "--hidden", "8", "--max-steps", "4", "--batch-size", "8", "--set", "train.tensorboard=false")


@pytest.fixture(scope="module")
def flow(place):
    import contextlib
    import io
    import sys

    from lmvae_fast.cli.app import main

    arguments = [
        "fit-flow", place / "vae", "--data", place / "definitions.tsv", "--vectors", place / "vectors.safetensors",
        "--output", place / "flow", "--skip-missing", "--shares", "0.6,0.2,0.2", "--json", *FIT,
    ]  # fmt: skip
    before, sys.argv = sys.argv, ["lmvae-fast", *map(str, arguments)]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as info:
            main()
    finally:
        sys.argv = before
    assert not info.value.code
    return json.loads(out.getvalue())


def test_fit_flow(place, flow):
    assert flow["stopped"] == "completed" and flow["step"] == 4 and flow["best"]["nll"] == flow["best"]["monitored"]
    assert (place / "flow" / "flow" / "flow.safetensors").is_file() and not (place / "flow" / "flow" / "vae").exists()
    known = json.loads((place / "flow" / "fit.json").read_text())
    assert known["shares"] == "0.6,0.2,0.2" and known["seed"] == 0 and not known["all"]


def test_what_fit_flow_refuses(place, flow, capsys):
    common = ("fit-flow", place / "vae", "--data", place / "definitions.tsv", "--output", place / "other", *FIT)
    vectors = ("--vectors", place / "vectors.safetensors")
    _, err = call(capsys, *common, *vectors, "--seed", "3", "--shares", "0.1,0.1,0.8", "--all", code=3)
    assert "'word19'" in err and "--skip-missing" in err and "missing='skip'" not in err
    assert (
        "--resume" in call(capsys, *common[:4], "--output", place / "flow", *vectors, "--skip-missing", *FIT, code=3)[1]
    )
    assert "three numbers" in call(capsys, *common, *vectors, "--shares", "0.5,0.5", code=3)[1]
    assert "unknown" in call(capsys, *common, *vectors, "--set", "flow.block=3", code=3)[1]
    assert "no file" in call(capsys, *common, "--vectors", place / "none.txt", code=3)[1]
    _, err = call(capsys, *common[:4], "--output", place / "flow", *vectors, "--skip-missing", *FIT, code=3)
    assert "already holds" in err


def test_define(place, flow, capsys):
    found = as_json(capsys, "define", place / "flow", "word1", "word2", "wordX", "--skip-missing")
    assert [entry["word"] for entry in found["words"]] == ["word1", "word2"] and found["missing"] == ["wordX"]
    assert all(len(entry["glosses"]) == 1 for entry in found["words"])
    drawn = as_json(capsys, "define", place / "flow", "word1", "--samples", "3", "--seed", "1")
    assert len(drawn["words"][0]["glosses"]) == 3
    assert as_json(capsys, "define", place / "flow", "word1", "--samples", "3", "--seed", "1") == drawn
    out, _ = call(capsys, "define", place / "flow", "word1")
    assert out.startswith("word1: ")
    twice = as_json(capsys, "define", place / "flow", "word2", "wordX", "word1", "word2", "wordX", "--skip-missing")
    assert [entry["word"] for entry in twice["words"]] == ["word2", "word1", "word2"] and twice["missing"] == ["wordX"]
    assert call(capsys, "define", place / "flow", "word1", "word1")[0].count("word1: ") == 2
    assert "'wordX'" in call(capsys, "define", place / "flow", "wordX", code=3)[1]
    assert "no conditions" in call(capsys, "define", place / "flow", "word1", "--condition", "n", code=3)[1]


def test_eval_definitions(place, flow, capsys, tmp_path):
    pytest.importorskip("nltk", reason="nltk, which makes BLEU, is not installed")
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    test = as_json(capsys, "eval", place / "flow", "--definitions", "--skip-missing", "--report", page)
    assert test["part"] == "test" and test["words"] + (test["skipped"] > 0) == 4
    assert {"sense_bleu_codwoe", "lemma_bleu_standard", "encoder_cosine", "nll", "reverse_rank"} <= test.keys()
    assert test["lemma_bleu_standard"] >= test["sense_bleu_standard"]
    assert "reverse dictionary: rank" in page.read_text()
    valid = as_json(
        capsys, "eval", place / "flow", "--definitions", "--skip-missing", "--part", "valid", "--metrics", "nll"
    )
    assert valid["nll"] == pytest.approx(flow["best"]["nll"], rel=1e-5)
    whole = as_json(
        capsys, "eval", place / "flow", place / "definitions.tsv", "--definitions", "--skip-missing", "--part", "all",
        "--metrics", "nll",
    )  # fmt: skip
    assert whole["pairs"] == 28 and whole["skipped"] == 2
    other = tmp_path / "other.tsv"
    other.write_text("lemma\tdefinition\nword1\ta thing\nword2\ta thing\nword3\ta thing\n")
    assert "--part all" in call(capsys, "eval", place / "flow", other, "--definitions", code=3)[1]
    assert "unknown part" in call(capsys, "eval", place / "flow", "--definitions", "--part", "dev", code=3)[1]
    assert "no sentences" in call(capsys, "eval", place / "vae", code=3)[1]


def test_the_recipe_fills_what_was_not_said():
    values = {"model": {"system": "llamavae", "latent_dim": 8}, "train": {"learning_rate": 1e-3}, "data": {}}
    with_recipe(values)
    assert values["model"] == {"system": "llamavae", "latent_dim": 8}
    assert values["train"]["learning_rate"] == 1e-3 and values["train"]["beta_cycles"] == 5
    values = {"model": {}, "train": {}, "data": {}}
    with_recipe(values)
    assert values == {"model": {}, "train": {}, "data": {}}
    from lmvae_fast.config import LMVAEConfig, TrainConfig
    from lmvae_fast.models.systems import RECIPES

    for model, train in RECIPES.values():  # the fields exist
        LMVAEConfig.from_dict(model)
        TrainConfig.from_dict(train)


@pytest.fixture(scope="module")
def codwoe(tmp_path_factory):
    """Parts as CODWOE gives them to train on: ids in place of words, vectors beside glosses."""
    folder = tmp_path_factory.mktemp("codwoe")
    generator = np.random.default_rng(0)
    for part, count in (("train", 9), ("dev", 4), ("test", 4)):
        rows = [
            {"id": f"en.{part}.{i}", "gloss": SENTENCES[(i + len(part)) % 8], "sgns": generator.normal(size=9).tolist()}
            for i in range(count)
        ]
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return folder


def test_definitions_that_come_in_parts_with_hidden_words(place, codwoe, capsys, tmp_path):
    train, dev, test = (codwoe / f"{part}.json" for part in ("train", "dev", "test"))
    common = ("fit-flow", place / "vae", "--data", train, "--vectors", train, "--field", "sgns", *FIT)
    _, err = call(capsys, *common, "--output", tmp_path / "none", code=3)
    assert "hidden" in err and "--valid" in err and "--all" in err
    found = as_json(capsys, *common, "--output", tmp_path / "parts", "--valid", dev)
    assert found["definitions"] == 9 and found["skipped"] == 0 and found["best"]["nll"]
    nll = ("--definitions", "--metrics", "nll")
    valid = as_json(capsys, "eval", tmp_path / "parts", *nll, "--part", "valid")
    assert valid["pairs"] == 4 and valid["nll"] == pytest.approx(found["best"]["nll"], rel=1e-5)
    assert as_json(capsys, "eval", tmp_path / "parts", *nll, "--part", "train")["pairs"] == 9
    assert as_json(capsys, "eval", tmp_path / "parts", test, *nll, "--part", "all")["pairs"] == 4
    assert "none of them is a test part" in call(capsys, "eval", tmp_path / "parts", *nll, code=3)[1]
    assert "not the definitions" in call(capsys, "eval", tmp_path / "parts", test, *nll, "--part", "valid", code=3)[1]
    # The same by a configuration, and all of one file without a part to stop by.
    (tmp_path / "c.yaml").write_text(f"data: {{eval_path: {dev}}}\n")
    again = as_json(capsys, *common, "--output", tmp_path / "again", "--config", tmp_path / "c.yaml")
    assert again["best"] == found["best"]
    whole = as_json(capsys, *common, "--output", tmp_path / "whole", "--all")
    assert whole["definitions"] == 9 and whole["best"] is None
    assert "not parted" in call(capsys, "eval", tmp_path / "whole", *nll, code=3)[1]
    assert as_json(capsys, "eval", tmp_path / "whole", *nll, "--part", "all")["pairs"] == 9
    _, err = call(capsys, *common, "--output", tmp_path / "none", "--all", "--early-stop", "2", code=3)
    assert "--valid" in err
    assert not (tmp_path / "none").exists()


def test_all_of_few_definitions_are_not_parted(place, capsys, tmp_path):
    (tmp_path / "d.tsv").write_text(f"lemma\tdefinition\nword1\t{SENTENCES[0]}\nword2\t{SENTENCES[1]}\n")
    common = ("fit-flow", place / "vae", "--data", tmp_path / "d.tsv", "--vectors", "encoder", "--output", tmp_path / "f",
              "--set", "train.initialize=false", "--set", "flow.bridge=auto", *FIT)  # fmt: skip
    assert "would be empty" in call(capsys, *common, code=3)[1]
    _, err = call(capsys, *common, "--all", code=3)
    assert "span fewer dimensions" in err  # of two words; no part was asked for


def test_a_damaged_fit_is_refused(place, flow, capsys, tmp_path):
    import shutil

    shutil.copytree(place / "flow", tmp_path / "flow")
    known = json.loads((tmp_path / "flow" / "fit.json").read_text())
    for name in ("data", "shares", "seed", "definitions"):
        for value in (None, []):
            (tmp_path / "flow" / "fit.json").write_text(json.dumps({**known, name: value}))
            assert "is damaged" in call(capsys, "eval", tmp_path / "flow", "--definitions", code=3)[1]


def test_a_model_of_prompts_defines_no_words(place, capsys, tmp_path):
    make_model(system="cvae", latent_dim=8, max_len=12).save_pretrained(tmp_path / "cvae", include_frozen=True)
    for vectors in ("encoder", place / "vectors.safetensors"):
        _, err = call(
            capsys, "fit-flow", tmp_path / "cvae", "--data", place / "definitions.tsv", "--vectors", vectors, "--output",
            tmp_path / "f", *FIT, code=3,
        )  # fmt: skip
        assert "prompts with responses cannot define words" in err
