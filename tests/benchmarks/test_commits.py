"""Comparing two commits: a checkout that cannot run is refused by name, and two sides of one commit agree and are timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import commits

HERE = Path(__file__).resolve().parents[2]


def test_a_checkout_without_an_environment_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no \.venv/bin/python: clone the commit and run `make setup`"):
        commits.check_checkout(tmp_path)


@pytest.mark.slow
def test_a_commit_agrees_with_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pythons = {name: (Path(sys.executable), HERE) for name in ("this", "other")}
    row = commits.compare("training step, teacher forcing, fp32", pythons, tmp_path, "4x256", 2, 2)
    assert row["differences"]["loss"] == 0.0
    assert row["ratio"] > 0
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
