"""What the compile gate covers, and that a launch which CUDA would refuse is refused with a reason."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from lmvae_fast.kernels.latent_attention import triton as attention
from lmvae_fast.kernels.latent_attention import visibility
from lmvae_fast.kernels.latent_attention.op import latent_attention
from lmvae_fast.kernels.launch import MAX_GRID, Config, launch
from tests.conftest import REPOSITORY

from .common import on_backend, require

GATE = REPOSITORY / "tools" / "compile_gate.py"


@pytest.fixture(scope="module")
def gate():
    """tools/compile_gate.py as a module; Triton keeps interpreting in this process."""
    interpreted = os.environ.get("TRITON_INTERPRET")
    spec = importlib.util.spec_from_file_location("compile_gate", GATE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_gate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    yield module
    del sys.modules["compile_gate"]


def test_every_integer_argument_of_every_kernel_is_compiled_at_one(gate):
    for op in gate.ops():
        jobs = list(gate.jobs_of(op))
        assert not [key for key, count in Counter(job.key for job in jobs).items() if count > 1]
        ones, empty, alone = {}, set(), set()
        for job in jobs:
            name = job.case.kernel.fn.__name__
            ones.setdefault(name, set()).update(job.ones)
            empty |= {name} if job.zeros == ("batch",) else set()
            alone |= {(name, job.ones[0])} if len(job.ones) == 1 else set()
        for job in jobs:
            name, integers = job.case.kernel.fn.__name__, gate.integers_of(job.case)
            assert set(integers) <= ones[name], f"{op}: {name} is not compiled with {integers} at 1"
            sizes = {(name, integer) for integer in integers if not integer.startswith("stride_")}
            assert sizes <= alone, f"{op}: one size of {name} is at 1 beside others only"
            assert "batch" not in integers or name in empty


def test_attention_is_compiled_for_groups_of_query_heads(gate):
    seen = {
        (case.kernel.fn.__name__, case.constants["GROUP"], case.config.constants["BLOCK_D"], case.constants["EXACT"])
        for case in attention.COMPILE_CASES
        if "GROUP" in case.constants
    }
    kernels = ("latent_attention_fwd_kernel", "latent_attention_bwd_kernel", "latent_attention_decode_kernel")
    for kernel in kernels:
        for group in (1, 2, 4, 8):
            for head_dim in (64, 128, 256):
                assert (kernel, group, head_dim, False) in seen
    uses = Counter(case.name.rsplit("-group", 1)[0] for case in attention.COMPILE_CASES if "-group" in case.name)
    assert uses["bwd-q-bf16-64-rows32-prefix"] == uses["bwd-kv-fp32-128-rows16-prefix"] == 3


def test_a_vocabulary_of_one_compiles(gate, tmp_path):
    """At 1 token the sizes are constants to Triton, which have no methods of a tensor, and the bits of the size are 1."""
    cases = gate.cases_of("sample_token")
    index = next(i for i, case in enumerate(cases) if case.name == "one-token-fp32")
    general = next(i for i, case in enumerate(cases) if case.name == "draw-fp32")
    code = (
        f"import sys; sys.path.insert(0, {str(GATE.parent)!r}); import compile_gate as gate\n"
        f"for index, ones in (({index}, ()), ({general}, {tuple(gate.integers_of(cases[general]))!r})):\n"
        f"    key, row = gate.compile_case(gate.Job('sample_token', index, 90, False, ones=ones))\n"
        "    assert 'error' not in row and not row['spill_bytes'], row\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_blocks_beyond_a_grids_second_axis_go_into_its_third():
    for blocks in (1, MAX_GRID[1], MAX_GRID[1] + 1, 2_100_000, 10 * MAX_GRID[1] + 7):
        pairs, second, third = attention._grid(4, blocks)
        assert pairs == 4 and second <= MAX_GRID[1] and blocks <= second * third < blocks + third
    assert 0 in attention._grid(4, 0)


@pytest.mark.parametrize("rule", visibility.VISIBILITIES)
def test_attention_over_a_folded_grid(rule, monkeypatch):
    """As for more than 2 million rows without max_seqlen, with a second axis of 2 in place of 65,535."""
    require("latent_attention", "triton", torch.float32)
    monkeypatch.setattr(attention, "MAX_GRID", (2**31 - 1, 2, 65_535))
    grids = []
    monkeypatch.setattr(attention, "launch", lambda *args, **more: (grids.append(args[1]), launch(*args, **more)))
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 3, 45], dtype=torch.int32)
    tensors = [torch.randn(45, heads, 16) for heads in (4, 2, 2)] + [torch.randn(2, 2, 45, 16) for _ in range(2)]
    options = {"cu_seqlens": cu_seqlens, "visibility": rule, "scale": 0.25}

    def run(name):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = on_backend(latent_attention, name)(*leaves, **options)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for mine, theirs in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(grids) == 3 and all(grid[2] > 1 for grid in grids), "no grid was folded: the test shows nothing"


def test_a_grid_that_cuda_does_not_launch_is_refused():
    kernel = attention.latent_attention_fwd_kernel
    with pytest.raises(ValueError, match=r"latent_attention_fwd_kernel.*65536.*65535"):
        launch(kernel, (1, 65_536), torch.device("cpu"), Config({}))
    launch(kernel, (0, 65_536), torch.device("cpu"), Config({}))  # no work
