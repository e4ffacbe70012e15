"""The decode engine on a CUDA device: recorded steps against plain ones, prompts, memory in place, refusals."""

from __future__ import annotations

import logging

import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.generation import cuda_graphs as graphs
from lmvae_fast.generation.decode_rows import Rows, Start
from lmvae_fast.generation.engine import generate
from lmvae_fast.models.decoder import recorded_step
from lmvae_fast.testing import FAMILIES, make_model
from tests.generation.test_engine import end_with_a_common_token

from .common import no_host_sync

pytestmark = pytest.mark.gpu

SYSTEMS = {
    "rolling": {},
    "prefix": {"visibility": "prefix", "slots": 4, "embedding_shift": True},
    "interleaved llama": {"family": "llama", "visibility": "interleaved"},
    "gemma2": {"family": "gemma2"},
    "optimus": {"system": "optimus"},
}
DRAWN = {"do_sample": True, "seed": 3, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "num_samples": 2}


def build(name="rolling", **options):
    """A model on the device and latents under which some of its sentences end early."""
    model = make_model(**{"family": "gpt2", "max_len": 24, **SYSTEMS[name], **options}).eval()
    z = 2 * torch.randn(45, 6)
    end_with_a_common_token(model, z)
    return model.cuda(), z.cuda()


@pytest.fixture
def recorded(monkeypatch):
    """The number of replays of each graph that is captured."""
    made: list[int] = []

    class Counted(recorded_step.CudaGraph):
        def __init__(self, step, device):
            super().__init__(step, device)
            made.append(0)

        def replay(self):
            made[-1] += 1
            super().replay()

    monkeypatch.setitem(recorded_step.CAPTURES, "cuda", Counted)
    return made


def ids(model, z, config, **inputs):
    return [(out.index, out.sample, out.ids, out.finished) for out in generate(model, z, config, **inputs)]


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_graphs_give_the_ids_of_plain_steps(recorded, name, options):
    """Over refills, with prompts, and in the smaller batches at the end; and those of the CPU."""
    model, z = build(name)
    prompts = ["the sun" if row % 3 else "" for row in range(45)]
    config = GenerationConfig(batch_size=20, max_new_tokens=20, **options)
    plain = ids(model, z, config.replace(cuda_graphs=False), prompts=prompts)
    assert not recorded
    assert ids(model, z, config, prompts=prompts) == plain
    assert len(recorded) > 1 and sum(recorded) > 20
    assert ids(model.cpu(), z.cpu(), config, prompts=prompts) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_captured(recorded, family):
    model, z = build(family=family, visibility="prefix", slots=2)
    config = GenerationConfig(batch_size=45)
    assert ids(model, z, config) == ids(model, z, config.replace(cuda_graphs=False))
    assert recorded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(recorded, dtype):
    model, z = build(dtype=dtype)
    config = GenerationConfig(batch_size=45)
    assert ids(model, z, config) == ids(model, z, config.replace(cuda_graphs=False))
    assert recorded


def test_few_rows_are_captured(recorded):
    model, z = build()
    config = GenerationConfig(batch_size=3)
    assert ids(model, z[:7], config) == ids(model, z[:7], config.replace(cuda_graphs=False))
    assert recorded


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_steps_wait_for_nothing(cuda_graphs):
    model, z = build()
    config = GenerationConfig(cuda_graphs=cuda_graphs, logprobs=True, **{**DRAWN, "num_samples": 1})
    with torch.no_grad():
        injection = model.inject(z[:8])
        rows = Rows(model, model.inject(z[:0]), 8, limit=20, longest_prompt=0, config=config, seed=1)
        rows.start(list(range(8)), injection, [Start(row, 0, row) for row in range(8)])
        for _ in range(graphs.PLAIN_STEPS + 1):  # compiled and captured
            rows.advance()
        with no_host_sync():
            for _ in range(5):
                rows.advance()
    assert rows.ended() == [] or max(rows.state["count"].tolist()) > 0


def test_a_decoder_that_waits_is_run_as_it_is(recorded, caplog):
    model, z = build()
    config = GenerationConfig(batch_size=20)
    plain = ids(model, z, config.replace(cuda_graphs=False))
    forward = model.decoder.body.forward
    model.decoder.body.forward = lambda **x: forward(**x) if float(x["inputs_embeds"].sum()) > -1e9 else None
    with caplog.at_level(logging.WARNING):
        assert ids(model, z, config) == plain
    assert "kernel by kernel" in caplog.text and not recorded
    assert torch.rand(3, device="cuda").isfinite().all()  # torch's generator is not left in a capture


def test_a_whole_block_is_projected_without_a_second_tensor():
    model, _ = build(max_len=64)
    z = torch.randn(512, 6, device="cuda")
    config = GenerationConfig(max_new_tokens=60)
    with torch.no_grad():
        model.inject(z)  # compiled
        rows = Rows(model, model.inject(z[:0]), 512, limit=60, longest_prompt=0, config=config, seed=None)
        room = rows.room(0, 512)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        injection = model.inject(z, out=room)
        assert torch.cuda.max_memory_allocated() - before < room.numel() * room.element_size() // 10
        assert torch.equal(injection.memory, model.inject(z).memory)
