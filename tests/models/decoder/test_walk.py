"""Walks over a model's parts find what torch's own find, in the same order."""

from __future__ import annotations

import pytest
from torch import nn

from lmvae_fast.models.decoder.walk import modules_of, parameters_of
from lmvae_fast.testing import make_model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_all_parts_once_in_torchs_order(family):
    model = make_model(family)
    assert list(map(id, modules_of(model))) == list(map(id, model.modules()))
    assert list(map(id, parameters_of(model))) == list(map(id, model.parameters()))


def test_parts_that_are_shared_or_absent():
    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2, bias=False)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.Sequential(shared, tied), nn.Linear(2, 3, bias=False))
    model.register_module("none", None)
    assert list(modules_of(model)) == list(model.modules())
    assert list(map(id, parameters_of(model))) == list(map(id, model.parameters()))


def test_adapters_are_left_out():
    options = {"train_decoder": True, "decoder_part": "lora", "lora_rank": 2}
    body = make_model("llama", **options).decoder.body
    names = {id(parameter): name for name, parameter in body.named_parameters()}
    without = [names[id(parameter)] for parameter in parameters_of(body, adapters=False)]
    assert without == [name for name in names.values() if ".lora_" not in name] and len(without) < len(names)
