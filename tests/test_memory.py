"""Numbers from outside that decide an allocation: refused before it is made, by an error that names the option.

Those of the command line are in ``tests/fuzz/test_fuzz_command_line.py``.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lmvae_fast as lf
from lmvae_fast import memory
from lmvae_fast.errors import ConfigError, LMVAEError, MemoryLimitError
from lmvae_fast.generation.latent_sources import latents_of_prior, latents_of_zero
from lmvae_fast.generation.workers import Workers
from lmvae_fast.memory import give_back, memory_guard
from lmvae_fast.models.decoder.tuning import Tuning
from lmvae_fast.models.flow import CouplingFlow
from lmvae_fast.probes.bootstrap import replicates
from lmvae_fast.probes.disentanglement.information import mutual_information
from lmvae_fast.testing import make_model, tiny_decoder

HUGE = 10**12


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", latent_dim=4, max_len=8).eval()


def _bins():
    mutual_information(np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 2, HUGE)


CASES = {
    "steps": (lambda model: lf.interpolate(model, "a cat", "water", HUGE), "ask for fewer"),
    "traversal steps": (lambda model: lf.traverse(model, "a cat", [0], HUGE), "ask for fewer"),
    "samples": (lambda model: lf.neighbourhood(model, "a cat", HUGE), "ask for fewer"),
    "latents of the prior": (lambda model: next(iter(latents_of_prior(HUGE, 4, 0).read(HUGE, 0))), "batch_size"),
    "latents of zero": (lambda model: next(iter(latents_of_zero(HUGE, 4).read(HUGE, 0))), "batch_size"),
    "num_samples": (
        lambda model: model.decode(torch.zeros(1, 4), do_sample=True, num_samples=HUGE, batch_size=HUGE), "batch_size",
    ),
    "num_beams": (lambda model: model.decode(torch.zeros(1, 4), num_beams=HUGE), "num_beams"),
    "workers": (lambda model: Workers(lambda *given: model, "none", HUGE), "workers"),
    "blocks": (lambda model: CouplingFlow(4, HUGE, 8), "blocks"),
    "hidden": (lambda model: CouplingFlow(4, 2, HUGE), "hidden"),
    "lora_rank": (lambda model: Tuning("lora", HUGE).apply(tiny_decoder("gpt2")), "lora_rank"),
    "bins": (lambda model: _bins(), "bins"),
    "resamples": (lambda model: replicates(lambda rows: 0.0, 10, number=HUGE), "resamples"),
    "kl_samples": (lambda model: lf.LMVAEConfig(kl_samples=HUGE), "kl_samples"),
    "residual_samples": (lambda model: lf.LMVAEConfig(residual_samples=HUGE), "residual_samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_before_it_is_made(model, name):
    call, named = CASES[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LMVAEError, match=named) as told:
        call(model)
    assert isinstance(told.value, (MemoryLimitError, ConfigError)) and "DefaultCPUAllocator" not in str(told.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("x\nDefaultCPUAllocator: can't allocate memory"),
     OverflowError("too large"), RuntimeError("Storage size calculation overflowed with sizes=[1]")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_memory_that_runs_out_within_a_guard(error):
    with (
        pytest.raises(MemoryLimitError, match=r"out of memory in the table.*lower rows"),
        memory_guard("the table", "lower rows"),
    ):
        raise error


def test_a_guard_leaves_other_errors_alone(monkeypatch):
    for error in (
        RuntimeError("shapes differ"),
        ValueError("can't allocate memory"),
        MemoryLimitError("mine", remedy="r"),
    ):
        with pytest.raises(type(error)) as told, memory_guard("the table", "lower rows"):
            raise error
        assert told.value is error
    monkeypatch.setattr(memory, "available", lambda device: 100)
    with memory_guard("a table", "lower rows", needed=100):
        pass
    with (
        pytest.raises(MemoryLimitError, match=r"about 0\.0 MB needed"),
        memory_guard("a table", "lower rows", needed=101),
    ):
        raise AssertionError("made")


def _resident(tensor: torch.Tensor) -> int:
    """Kilobytes of a tensor's mapping that are in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is in memory")
def test_weights_of_a_file_are_given_back_and_read_again(tmp_path):
    truth = torch.randn(1024, 1024)
    save_file({"weight": truth}, tmp_path / "weights.safetensors")
    weight = load_file(tmp_path / "weights.safetensors")["weight"]
    assert weight.sum().isfinite() and _resident(weight) > 3000
    give_back([weight, torch.ones(8), weight.t(), torch.empty(0)])
    assert _resident(weight) < 1000
    assert torch.equal(weight, truth)
    weight[3, 7] = truth[3, 7] = 5.0  # a page that is no file's any more: it must not be lost
    give_back([weight])
    assert torch.equal(weight, truth)
