"""Models and checkpoints that an earlier release wrote: they load, decode the same ids, and are resumed.

``fixture/`` was written by the package at commit 82724f0, before its files were rearranged, on one thread: two saved models
with latents and what they decoded to, a run stopped after step 4 of 8, and the weights that the unbroken run ended with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lmvae_fast as lf
from tests.training.helpers import plain_sentences, settings

FIXTURE = Path(__file__).parent / "fixture"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_saved_model_loads_and_decodes_the_same_ids(name):
    expected = EXPECTED[name]
    model = lf.LMVAE.from_pretrained(FIXTURE / name)
    assert [out.ids for out in lf.generate(model, torch.tensor(expected["latents"]))] == expected["ids"]
    torch.testing.assert_close(
        model.encode(expected["sentences"]).mu, torch.tensor(expected["mu"]), rtol=1e-5, atol=1e-6
    )


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """To the bit on the machine that wrote it; elsewhere sums are rounded in another order."""
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    model = lf.LMVAE.from_pretrained(FIXTURE / "langvae")
    model.config = model.config.replace(encoder="tiny-encoder", decoder="tiny-decoder")
    options = {"max_steps": 8, "log_every": 4, "save_every": 4, "beta_schedule": "constant", "beta": 0.1}
    result = lf.train(model, plain_sentences(20), None, settings(tmp_path / "run", **options, resume=True))
    assert result.step == 8 and [record["step"] for record in result.history] == [4, 8]
    expected = load_file(FIXTURE / "resumed.safetensors")
    got = model.trainable_state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
