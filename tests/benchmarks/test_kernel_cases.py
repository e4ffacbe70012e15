"""The cases of `benchmarks.kernels`: both sides of each run, and agree. Where sizes are the module's, over small ones."""

from __future__ import annotations

import importlib

import pytest
import torch

#: Names of a module and the smaller sizes that they are given.
SMALL = {
    "latent_kv": {"GPT2": (2, 2, 2, 5, 16), "NZ": 32},
    "latent_attention": {"BATCH": 4, "HEADS": 2, "HEAD_DIM": 16},
    "coupling_flow": {"DIM": 16, "HIDDEN": 32, "BLOCKS": 2},
    "posterior": {},
    "sample_token": {},
    "frozen_layer": {},
    "aggregate_logpdf": {},
}


@pytest.mark.parametrize("op", SMALL)
def test_both_sides_of_every_case_run_and_agree(op, monkeypatch):
    module = importlib.import_module(f"benchmarks.kernels.bench_{op}")
    for name, size in SMALL[op].items():
        monkeypatch.setattr(module, name, size)
    torch.manual_seed(0)
    for case in module.cases("cpu"):
        if case.check is not None:
            case.check()
        for side in (case.ours, case.baseline, *case.others.values()):
            side()
            side()  # a fresh graph each time
