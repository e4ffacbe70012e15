"""A recipe's bf16 is fp32 where a device only imitates it, what a user says stays, and a slow choice is named."""

from __future__ import annotations

import logging

import pytest
import torch

from lmvae_fast.cli.train import with_recipe
from lmvae_fast.models.systems import RECIPES
from lmvae_fast.training import precision
from lmvae_fast.training.precision import multiplies_bf16, settled
from tests.training.helpers import run


@pytest.fixture(params=[False, True], ids=["imitates", "multiplies"])
def able(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: request.param)
    return request.param


def test_this_cpu_is_known():
    expected = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplies_bf16("cpu") is bool(expected)


def test_a_recipes_bf16_is_for_devices_that_multiply_in_it(able):
    assert settled(RECIPES["lmvae"][1])["precision"] == ("bf16" if able else "fp32")
    assert settled({"precision": "fp16"}) == {"precision": "fp16"} and settled({}) == {}
    assert RECIPES["lmvae"][1]["precision"] == "bf16"  # the recipe itself is left alone
    said = {"model": {"system": "lmvae"}, "train": {"precision": "bf16"}, "data": {}}
    with_recipe(said)
    assert said["train"]["precision"] == "bf16"
    unsaid = {"model": {"system": "lmvae"}, "train": {}, "data": {}}
    with_recipe(unsaid)
    assert unsaid["train"]["precision"] == ("bf16" if able else "fp32")


@pytest.mark.parametrize("asked", ["bf16", "fp32"])
def test_a_run_says_that_its_precision_is_imitated(able, asked, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lmvae_fast"):
        run(tmp_path, max_steps=1, precision=asked)
    assert ("no bfloat16 products" in caplog.text) is (asked == "bf16" and not able)
