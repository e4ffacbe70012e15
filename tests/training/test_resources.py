"""What a run sets up for its steps: frozen weights in half precision, the allocator."""

import subprocess
import sys

import torch

from lmvae_fast.training import Callback
from lmvae_fast.training.resources import frozen_in
from tests.models.tiny import make_model
from tests.training.helpers import run


def test_a_frozen_decoder_is_held_in_half_precision_and_given_back_to_the_bit(tmp_path):
    class Watch(Callback):
        def on_step(self, run):
            seen.update(value.dtype for value in run.model.decoder.parameters())
            trained = [value.dtype for value in run.model.parameters() if value.requires_grad]
            assert set(trained) == {torch.float32}
            assert run.model._compute_dtype == torch.bfloat16

    seen: set[torch.dtype] = set()
    model = make_model("llama", max_len=12)
    before = {name: value.clone() for name, value in model.decoder.named_parameters()}
    run(tmp_path, Watch(), model=model, max_steps=2, precision="bf16")
    assert seen == {torch.bfloat16}
    for name, value in model.decoder.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name


def test_beside_a_trained_part_only_matrices_are_held_in_half_precision():
    model = make_model("llama", max_len=12)
    head = model.decoder.head_weight
    head.requires_grad_(True)
    with frozen_in(model.decoder, torch.bfloat16):
        for value in model.decoder.parameters():
            half = not value.requires_grad and value.dim() > 1
            assert value.dtype == (torch.bfloat16 if half else torch.float32)
    assert all(value.dtype == torch.float32 for value in model.decoder.parameters())


def test_freed_memory_is_given_back_after_the_run():
    """In a process of its own: what the kernel counts as this process's memory, during and after."""
    if sys.platform != "linux":
        return
    program = """
import torch
from lmvae_fast.training.resources import keeping_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def step():
    return [torch.ones(2**24) for _ in range(4)]  # 256 MiB, freed on return
step()
before = resident()
with keeping_freed_memory(torch.device("cpu")):
    step()
    assert resident() - before > 200 * 2**20, "freed memory was not kept"
assert resident() - before < 50 * 2**20, "kept memory was not given back"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
