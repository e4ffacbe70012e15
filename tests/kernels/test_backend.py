"""The registry: what is chosen, what is refused and with which words, and that it traces."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from lmvae_fast.kernels import backend as registry
from lmvae_fast.kernels.backend import BackendError, Support, backend
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.kernels.registration import autocast

from .common import raises_naming


@pytest.fixture
def toy_op():
    """An op with a C++ form that does not exist and a Triton form for short heads only."""
    registry.register(
        "toy",
        cpp=Support(primitives=("toy_that_no_one_built",)),
        triton=Support(
            check=lambda facts: None if facts["head_dim"] <= 64 else f"head_dim={facts['head_dim']} is above 64"
        ),
    )
    yield "toy"
    del registry._state.ops["toy"]
    registry._state.chosen = {k: v for k, v in registry._state.chosen.items() if k[0] != "toy"}


def test_auto_takes_the_reference_where_nothing_else_can_run(toy_op):
    assert registry.choose(toy_op, torch.zeros(1), head_dim=64) == "reference"


def test_a_forced_backend_that_cannot_run_says_why(toy_op):
    x = torch.zeros(1)
    with backend("cpp"), raises_naming(BackendError, "toy", "cpp"):
        registry.choose(toy_op, x, head_dim=64)
    with backend("cuda"), raises_naming(BackendError, "toy has no cuda implementation"):
        registry.choose(toy_op, x, head_dim=64)
    if registry.INTERPRET:
        with backend("triton"), raises_naming(BackendError, "head_dim=128 is above 64"):
            registry.choose(toy_op, x, head_dim=128)
        with backend("triton"), raises_naming(BackendError, "float64"):
            registry.choose(toy_op, x.double(), head_dim=64)
        with backend("triton"):
            assert registry.choose(toy_op, x, head_dim=64) == "triton"


def test_a_missing_primitive_is_named(toy_op):
    if not registry.extension()[0]:
        pytest.skip("no C++ extension")
    reason = registry.why_not(toy_op, "cpp", "cpu", torch.float32, {})
    assert "toy_that_no_one_built" in reason


def test_unknown_names_are_refused():
    with raises_naming(ValueError, "fastest", "reference"), backend("fastest"):
        pass
    with raises_naming(ValueError, "opencl"):
        registry.register("toy2", opencl=Support())


def test_the_previous_choice_comes_back_after_an_error():
    before = registry.current()
    with pytest.raises(RuntimeError), backend("reference"):
        raise RuntimeError
    assert registry.current() == before


def test_each_choice_is_logged_once(toy_op, caplog):
    with caplog.at_level(logging.INFO, logger="lmvae_fast"):
        for _ in range(3):
            registry.choose(toy_op, torch.zeros(1), head_dim=32)
    assert len([r for r in caplog.records if "toy" in r.message]) == 1


def test_the_report_has_every_op_and_backend_and_one_choice_each(toy_op):
    rows = [row for row in registry.report(head_dim=64) if row.op == toy_op]
    assert [row.backend for row in rows] == list(registry.BACKENDS)
    assert [row.backend for row in rows if row.chosen] == ["reference"]
    assert all(row.reason for row in rows)
    with backend("cuda"):
        rows = [row for row in registry.report(head_dim=64) if row.op == toy_op]
    assert not any(row.chosen for row in rows)
    assert "asked for" in " ".join(row.reason for row in rows)


def test_the_environment_forces_a_backend_for_the_process():
    code = "from lmvae_fast.kernels.backend import current; print(current())"
    run = [sys.executable, "-c", code]
    good = subprocess.run(run, env={**os.environ, "LMVAE_BACKEND": "reference"}, capture_output=True, text=True)
    assert good.stdout.strip() == "reference"
    bad = subprocess.run(run, env={**os.environ, "LMVAE_BACKEND": "fast"}, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "LMVAE_BACKEND='fast'" in bad.stderr


def test_a_compiled_function_follows_a_change_of_backend():
    """The forced backend is a guard of the graph: switching it recompiles instead of keeping the old choice."""
    x = torch.randn(4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: posterior_sample(a, a, seed=torch.tensor([1, 2])), fullgraph=True, backend="eager"
    )
    plain = compiled(x)[0]
    with backend("cuda"), pytest.raises(Exception, match="posterior_sample has no cuda implementation"):
        compiled(x)
    with backend("reference"):
        torch.testing.assert_close(compiled(x)[0], plain)


def test_autocast_leaves_fp64_and_integers_alone():
    with torch.autocast("cpu", torch.bfloat16):
        a, b, c, d = autocast("cpu", torch.zeros(1), torch.zeros(1).double(), torch.zeros(1, dtype=torch.int64), None)
    assert (a.dtype, b.dtype, c.dtype, d) == (torch.bfloat16, torch.float64, torch.int64, None)
    assert autocast("cpu", torch.zeros(1))[0].dtype == torch.float32


def test_blocks_of_two_threads_that_overlap_leave_neither_forced():
    """Each thread sees its own choice, whichever of the two ends first, and the process is left as it was."""
    before, seen, entered, left = registry.current(), {}, threading.Event(), threading.Event()
    inside = threading.Barrier(2, timeout=30)
    x = torch.zeros(2, 3)

    def first() -> None:
        with backend("reference"):
            entered.set()
            inside.wait()
            seen["first"] = registry.choose("posterior_sample", x)
        left.set()
        seen["first, after its block"] = registry.current()

    def second() -> None:
        entered.wait(30)
        with backend("cuda"):
            inside.wait()
            left.wait(30)
            with raises_naming(BackendError, "cuda"):
                registry.choose("posterior_sample", x)
            seen["second"] = registry.current()
        seen["second, after its block"] = registry.current()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {
        "first": "reference", "second": "cuda", "first, after its block": before, "second, after its block": before,
    }  # fmt: skip
    assert registry.current() == before


def test_a_block_of_the_main_thread_and_one_of_another_leave_neither_forced():
    before, seen = registry.current(), {}
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with backend("reference"):
            inside.set()
            left.wait(30)
            seen["other"] = registry.current()
        seen["other, after its block"] = registry.current()

    thread = threading.Thread(target=other)
    with backend("cuda"):
        thread.start()
        assert inside.wait(30)
        seen["main"] = registry.current()
    left.set()
    thread.join(60)
    assert seen == {"main": "cuda", "other": "reference", "other, after its block": before}
    assert registry.current() == before


def test_blocks_of_coroutines_that_interleave_leave_neither_forced():
    """They share the main thread and close in the order in which they were opened."""
    import asyncio

    before, seen = registry.current(), []

    async def one(opened, other):
        with backend("reference"):
            opened.set()
            await other.wait()
        seen.append(registry.current())

    async def two(opened, other, done):
        await opened.wait()
        with backend("cpp"):
            other.set()
            await done.wait()
            seen.append(registry.current())

    async def both():
        opened, other, done = (asyncio.Event() for _ in range(3))
        tasks = [asyncio.create_task(one(opened, other)), asyncio.create_task(two(opened, other, done))]
        await tasks[0]
        done.set()
        await tasks[1]

    asyncio.run(both())
    assert seen == ["cpp", "cpp"] and registry.current() == before

    def generator():
        with backend("reference"):
            yield

    first, second = generator(), generator()
    next(first), next(second)
    first.close()
    assert registry.current() == "reference"
    second.close()
    assert registry.current() == before
