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
from lmvae_fast.kernels.launch import MAX_GRID, CompileCase, Config, launch
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
    del sys.modules["compile_gate"], sys.modules["compile_jobs"]
    sys.path.remove(str(GATE.parent))


def test_every_integer_argument_of_every_kernel_is_compiled_at_one(gate):
    for op in gate.compile_jobs.ops():
        jobs = list(gate.jobs_of(op))
        assert not [key for key, count in Counter(job.key for job in jobs).items() if count > 1]
        ones, empty, alone = {}, set(), set()
        for job in jobs:
            name = job.case.kernel.fn.__name__
            ones.setdefault(name, set()).update(job.ones)
            empty |= {name} if job.zeros == ("batch",) else set()
            alone |= {(name, job.ones[0])} if len(job.ones) == 1 else set()
        for job in jobs:
            name, integers = job.case.kernel.fn.__name__, gate.compile_jobs.integers_of(job.case)
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


ROW = {"registers": 90, "spill_bytes": 0, "shared": 4096, "matrix": 8, "warpgroup": 2, "loads": [6, 1, 2],
       "stores": [1, 0, 0], "division64": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"registers": 129}, "129 registers, allowed 128"),
        ({"shared": 200 << 10}, "bytes of shared memory"),
        ({"matrix": 0, "warpgroup": 0}, "no tensor-core instruction"),
        ({"warpgroup": 0}, "no wgmma"),
        ({"loads": [0, 12, 3]}, "0 loads of 16 bytes beside 12 of 8"),
        ({"division64": 1}, "divisions of 64-bit integers"),
    ],
)
def test_a_row_is_held_to_what_its_case_means(gate, figure, said):
    case = CompileCase("all", attention.latent_attention_fwd_kernel, {}, Config({}), tensor_cores=True, warpgroup=True,
                       wide_loads=True, max_registers=128)  # fmt: skip

    class Job:
        capability, aligned, special = 90, True, ""

    Job.case = case
    problems = gate.judge(Job, {**ROW, **figure}, None)
    assert not problems if said is None else any(said in problem for problem in problems), problems


def test_accesses_are_counted_by_their_width(gate):
    sass = """
        /*0100*/  @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/      LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0120*/      LDG.E.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0130*/      LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0140*/      LDS.128 R12, [R3] ;
        /*0150*/      STG.E.128 desc[UR4][R2.64], R4 ;
    """
    assert gate.compile_jobs.widths(gate.compile_jobs.LOAD_SASS, sass) == [2, 1, 1]
    assert gate.compile_jobs.widths(gate.compile_jobs.STORE_SASS, sass) == [1, 0, 0]


KERNEL = """
import triton
import triton.language as tl

SCALE = tl.constexpr({scale})

@triton.jit
def _inner(x):
    {comment}
    return x * {factor}

@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, _inner(tl.load(at)) * SCALE)
"""


def test_a_digest_is_of_the_code_and_not_of_where_it_stands(gate, tmp_path):
    def source(name, above="", **parts):
        file = tmp_path / f"{name}.py"
        file.write_text(above + KERNEL.format(**{"scale": 2.0, "factor": 3.0, "comment": "", **parts}))
        spec = importlib.util.spec_from_file_location("digested", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return gate.compile_jobs.source_of(module.kernel)

    first = source("first")
    assert source("moved", above="\n\n# something above\n", comment="# a word") == first
    assert source("constant", scale=4.0) != first
    assert source("callee", factor=5.0) != first


def test_rows_of_the_code_as_it_is_stand_and_others_do_not(gate):
    jobs = {job.key: job for job in list(gate.jobs_of("posterior"))[:6]}
    recorded = {key: {**ROW, "source": job.digest()} for key, job in jobs.items()}
    assert set(gate.standing(jobs, recorded)) == set(jobs)
    changed, missing, *_ = recorded
    recorded[changed]["source"] = "0" * 16
    del recorded[missing]
    assert set(gate.standing(jobs, recorded)) == set(jobs) - {changed, missing}


def test_a_table_keeps_every_version_and_forgets_another_readers(gate, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.json")
    assert gate.read_table() == {}
    gate.write_table({"3.9.0": {"op/a/sm_90": ROW}, "3.6.0": {"op/a/sm_90": ROW, "op/b/sm_90": ROW}})
    gate.update_table("3.9.0", {"op/c/sm_90": ROW}, {"op/a/sm_90"})
    assert {version: list(rows) for version, rows in gate.read_table().items()} == {
        "3.6.0": ["op/a/sm_90", "op/b/sm_90"],
        "3.9.0": ["op/c/sm_90"],
    }
    monkeypatch.setattr(gate, "READER", gate.READER + 1)
    assert gate.read_table() == {}


def test_older_versions_are_compiled_for_the_cards_they_run_on(gate):
    keys = {job.key for job in gate.jobs_of("latent_kv", gate.TARGETS_OF_OLDER)}
    assert keys < {job.key for job in gate.jobs_of("latent_kv")}
    assert {key.rsplit("/", 1)[1] for key in keys} == {"sm_90", "sm_90-aligned"}
    early = [key for key in keys if "adamw-early" in key]
    assert early and all(key.endswith("-aligned") for key in early)


def compiled(tmp_path, op, jobs):
    """Compile cases, (index, sizes that are 1) each, where nothing interprets; none may fail or spill."""
    code = (
        f"import sys; sys.path.insert(0, {str(GATE.parent)!r}); import compile_gate as gate\n"
        f"for index, ones in {tuple(jobs)!r}:\n"
        f"    key, row = gate.compile_case(gate.Job({op!r}, index, 90, False, ones=ones))\n"
        "    assert 'error' not in row and not row['spill_bytes'], row\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_vocabulary_of_one_compiles(gate, tmp_path):
    """At 1 token the sizes are constants to Triton, which have no methods of a tensor, and the bits of the size are 1."""
    cases = gate.cases_of("sample_token")
    index = next(i for i, case in enumerate(cases) if case.name == "one-token-fp32")
    general = next(i for i, case in enumerate(cases) if case.name == "draw-fp32-many")
    compiled(tmp_path, "sample_token", [(index, ()), (general, tuple(gate.compile_jobs.integers_of(cases[general])))])


def test_attention_compiles_for_the_narrowest_heads(gate, tmp_path):
    """What is meant for heads of 256 columns cannot be compiled for them, and must not be."""
    cases = [case.name for case in gate.cases_of("latent_attention")]
    names = ("fwd-fp32-16-rows16-prefix", "bwd-all-bf16-32-rows16-prefix")
    compiled(tmp_path, "latent_attention", [(cases.index(name), ()) for name in names])


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
