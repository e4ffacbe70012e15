"""Linguistic probing: classifiers of MiniLM's embeddings as recorded, SentEval's format and protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes.linguistic import evaluate, read_task, read_tasks
from lmvae_fast.probes.senteval_mlp import evaluate_mlp

TASKS = ("past_present", "sentence_length", "bigram_shift")


@pytest.fixture
def task(arrays):
    def load(name):
        file = arrays(f"probing/{name}.npz")
        return file["x"].astype(np.float64), file["y"], file["part"]

    return load


@pytest.mark.parametrize("name", TASKS)
def test_recorded_tasks(task, record, name):
    x, y, part = task(name)
    found, want = evaluate(x, y, part), record(f"probing/{name}.json")
    assert found.value == pytest.approx(want["test_accuracy"], abs=0.01) and found.choices["C"] == float(
        want["best_C_on_va"]
    )
    for value, figures in want["by_C"].items():
        ours = found.details["by_C"][float(value)]
        for mine, theirs in (("tr", "train"), ("va", "va"), ("te", "te")):
            assert ours[mine] == pytest.approx(figures[theirs], abs=0.01)
        assert ours["nll"] == pytest.approx(figures["mean_nll_te"], abs=1e-3)
    assert list(found.left_out["dimensions"]) == want["dimensions_constant_on_train"]
    assert list(found.choices["rows"].values()) == want["n"]
    scaled = evaluate(x, y, part, standardise=True, grid=[1.0])
    assert scaled.value == pytest.approx(want["standardised_C1_te"], abs=0.01)


def test_smaller_penalty_wins_a_tie_and_labels_may_be_text():
    x = np.repeat([-1.0, 1.0], 15)[:, None]
    y, part = np.where(x[:, 0] > 0, "PRES", "PAST"), np.array(["tr", "va", "te"] * 10)
    found = evaluate(x, y, part, grid="senteval")
    assert found.value == 1.0 and found.choices["C"] == 0.25 and len(found.details["by_C"]) == 6
    assert found.choices["chance"] == 0.5


def test_classifier_of_senteval(task):
    x, y, part = task("past_present")
    before = torch.get_rng_state()
    options = {"penalties": (1e-5,), "max_epochs": 24}
    linear, again = evaluate_mlp(x, y, part, hidden=0, **options), evaluate_mlp(x, y, part, hidden=0, **options)
    assert torch.equal(before, torch.get_rng_state()) and linear == again and linear.seed == 1111
    assert linear.value > 0.7  # logistic regression, trained to its end: 0.88; chance: 0.5
    assert evaluate_mlp(x, y, part, dropout=0.1, **options).value > 0.6
    other = evaluate_mlp(x, y, part, hidden=0, seed=3, **options)
    assert other.details["by_penalty"] != linear.details["by_penalty"]


def test_tasks_of_a_folder(shared, tmp_path):
    tasks = read_tasks(shared / "data" / "probing")  # beside the ten there is a licence
    assert [task.name for task in tasks][:3] == ["bigram_shift", "coordination_inversion", "obj_number"] and len(
        tasks
    ) == 10
    assert len(tasks[0]) == 2000 and set(tasks[0].parts) == {"tr", "va", "te"} and set(tasks[0].labels) == {"I", "O"}
    path = tmp_path / "tense.txt"
    path.write_text("tr\tPAST\tit rained\ntr\tPRES\n")
    with pytest.raises(DataError, match="line 2: not a row of a probing task; got: 2 fields"):
        read_task(path)
    with pytest.raises(DataError, match="line 2"):
        read_tasks(tmp_path)
    path.write_text("tr\tPAST\tit rained\n")
    with pytest.raises(DataError, match="no rows of a part; got: va, te"):
        read_task(path)
    path.write_text("hello\n")
    with pytest.raises(DataError, match="holds no probing task"):
        read_tasks(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        read_tasks(tmp_path / "none")


def test_refusals():
    x, part = np.random.default_rng(0).normal(size=(9, 2)), ["tr"] * 5 + ["va"] * 2 + ["te"] * 2
    with pytest.raises(DataError, match="elsewhere only: c"):
        evaluate(x, list("ababaabac"), part)
    with pytest.raises(DataError, match="empty: te"):
        evaluate(x, list("ababababa"), ["tr"] * 7 + ["va"] * 2)
    with pytest.raises(DataError, match="unknown: dev"):
        evaluate(x, list("ababababa"), ["tr"] * 7 + ["dev"] * 2)
    with pytest.raises(DataError, match="one value for each row"):
        evaluate(x, list("abab"), part)
    with pytest.raises(ConfigError, match="unknown grid"):
        evaluate(x, list("ababababa"), part, grid="fine")
    with pytest.raises(DataError, match="penalties above 0"):
        evaluate(x, list("ababababa"), part, grid=[0.0])
    with pytest.raises(ConfigError, match="hidden is out of range"):
        evaluate_mlp(x, list("ababababa"), part, hidden=-1)
