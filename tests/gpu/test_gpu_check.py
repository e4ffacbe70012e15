"""tools/gpu_check.py without a device: time limits, red tests, budgets, the ways to build, what it writes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import loops
from benchmarks.kernels import run as kernel_benchmarks
from benchmarks.training import end_to_end
from lmvae_fast.generation import cuda_graphs as graphs
from lmvae_fast.models.decoder import recorded_step
from tests.conftest import REPOSITORY
from tests.generation.replay import RecordedOperations
from tests.processes import PATIENCE, wait_until_gone


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def python(code):
    return [sys.executable, "-c", code]


def stage(gpu_check, name, command, least=1, most=PATIENCE):
    def run(context, seconds):
        done = context.run(command, seconds)
        return {"status": sys.modules["gpu_stages"].verdict(done), "tail": done.tail}

    return gpu_check.Stage(name, least, most, run)


def test_a_red_stage_fails_the_run_and_the_later_ones_still_run(gpu_check, tmp_path, capsys):
    stages = [
        stage(gpu_check, "red", python("print('this went wrong'); raise SystemExit(3)")),
        gpu_check.Stage("broken", 1, 9, lambda context, seconds: 1 / 0),
        stage(gpu_check, "absent", [str(tmp_path / "no-such-program")]),
        stage(gpu_check, "green", python("print('fine')")),
    ]
    assert gpu_check.main(["--output", str(tmp_path)], stages) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    status = {name: result["status"] for name, result in summary["stages"].items()}
    assert status == {"red": "failed", "broken": "failed", "absent": "failed", "green": "ok"}
    assert summary["red"] == ["red", "broken", "absent"]
    assert "ZeroDivisionError" in summary["stages"]["broken"]["reason"]
    log = (tmp_path / "log.txt").read_text()
    assert "this went wrong" in log and "fine" in log
    assert "red: red, broken, absent" in capsys.readouterr().out
    assert gpu_check.main(["--output", str(tmp_path), "--stage", "green"], stages) == 0


def test_a_stage_that_hangs_is_stopped_with_all_it_started(gpu_check, tmp_path):
    note = tmp_path / "child"
    # it hangs, and so does what it started, for longer than anyone waits
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(36000)'])\n"
        f"part = pathlib.Path({str(note)!r} + '.part')\n"
        "part.write_text(str(child.pid)); os.replace(part, str(part)[:-5])\n"
        "time.sleep(36000)\n"
    )
    seconds = 1.5
    while True:  # until it hung and was not merely slow to start, as on a loaded machine
        assert gpu_check.main(["--output", str(tmp_path)], [stage(gpu_check, "hangs", python(code), most=seconds)]) == 1
        assert json.loads((tmp_path / "summary.json").read_text())["stages"]["hangs"]["status"] == "timeout"
        if note.exists():
            break
        seconds *= 2
        assert seconds < 600, "it never got as far as to hang"
    wait_until_gone(int(note.read_text()))


def test_the_budget_shortens_stages_and_keeps_time_for_the_later_ones(gpu_check, tmp_path):
    given = {}

    def note(name):
        def run(context, seconds):
            given[name] = seconds
            return {"status": "ok"}

        return run

    stages = [gpu_check.Stage("a", 10, 500, note("a")), gpu_check.Stage("b", 30, 20, note("b"))]
    began = time.monotonic()
    gpu_check.main(["--output", str(tmp_path), "--budget", "100"], stages)
    spent = time.monotonic() - began
    assert 70 - spent <= given["a"] <= 70
    assert given["b"] == 20 or spent > 60
    stages = [gpu_check.Stage("c", 10, 500, note("c"))]
    assert gpu_check.main(["--output", str(tmp_path), "--budget", "2"], stages) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["stages"]["c"]["status"] == "skipped"


def test_outcomes_are_read_from_what_pytest_wrote(gpu_check, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.parametrize('a', [1])\ndef test_not_here(a): pytest.skip('no')\n"
    )
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = sys.modules["gpu_stages"].counts(junit)
    assert (found["tests"], found["passed"], found["failed"], found["skipped"]) == (3, 1, 1, 1)
    assert found["red"] == ["test_some::test_bad"]
    assert not kernel_benchmarks.recorded_green("test_some.py", junit)
    assert not kernel_benchmarks.recorded_green("tests/gpu/test_cuda_posterior.py", junit), "nothing of it has run"
    junit.write_text('<testsuite><testcase classname="tests.gpu.test_cuda_posterior" name="a"/></testsuite>')
    assert kernel_benchmarks.recorded_green("tests/gpu/test_cuda_posterior.py", junit)


def test_tests_that_run_nothing_are_red(gpu_check, tmp_path):
    context = gpu_check.Context(tmp_path, tmp_path)
    result = sys.modules["gpu_stages"].run_pytest(
        context, PATIENCE, tmp_path / "x.xml", ["-k", "no_such_test"], ["tests/gpu/test_gpu_check.py"]
    )
    assert result["status"] == "failed"


def test_links_make_an_importable_package(gpu_check, tmp_path):
    site = sys.modules["gpu_stages"].link_package(tmp_path)
    code = "import lmvae_fast, lmvae_fast.kernels.posterior as p; print(lmvae_fast.__file__, p.__name__)"
    # -S and a bare path: the editable install of this environment must not be what is found
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert str(site) in done.stdout and "lmvae_fast.kernels.posterior" in done.stdout


def test_commands_of_a_fallback_build_import_the_linked_package(gpu_check, tmp_path):
    """At the root of the repository `python -c` and `python -m` find lmvae_fast/ there, which has no kernels."""
    context = gpu_check.Context(tmp_path, tmp_path)
    context.environment = {"PATH": "/usr/bin:/bin"}
    isolated = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    code = isolated + "import benchmarks, lmvae_fast.kernels as k; print(k.__file__, benchmarks.__path__)"
    assert context.run(python(code), 60).code, "this test would show nothing"
    sys.modules["gpu_stages"].use_links(context)
    done = context.run(python(code), 60)
    assert done.code == 0, done.tail
    assert done.tail.count(str(context.folder)) == 2
    collected = context.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/gpu/test_gpu_check.py"], 120
    )
    assert collected.code == 0 and "test_commands_of_a_fallback_build" in collected.tail


def test_ops_that_are_for_the_cpu_alone_do_not_redden_the_benchmarks(gpu_check, tmp_path, monkeypatch, capsys):
    elsewhere = [op for op in kernel_benchmarks.available() if "cuda" not in kernel_benchmarks.devices_of(op)]
    assert elsewhere == ["greedy_head", "packed_linear"]
    monkeypatch.setattr(sys, "argv", ["run", *elsewhere, "--device", "cuda", "--output", str(tmp_path)])
    assert kernel_benchmarks.main() == 0
    assert capsys.readouterr().out.count("not for cuda") == 2
    with_cuda = set(kernel_benchmarks.available()) - set(elsewhere)
    missing = [op for op in with_cuda if not (REPOSITORY / kernel_benchmarks.tests_of(op, "cuda")).exists()]
    assert not missing, "without these tests nothing is reported of these ops"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_end_to_end_measures_the_paths_that_ours_takes_by_itself(dtype, monkeypatch):
    """Training through the fused AdamW of the projector, decoding where steps can be recorded."""
    ours, reference = end_to_end.build("cpu", {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 400})
    before = ours.projector.weight.detach().clone()
    step, other, losses, _, fused = end_to_end.training_steps(ours, reference, 2, "cpu", dtype)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype is None else 2e-2)
    step()
    other()
    assert fused and ours.projector.weight.grad is None and not torch.equal(before, ours.projector.weight)
    monkeypatch.setitem(recorded_step.CAPTURES, "cpu", object)
    mine, theirs = end_to_end.decoders(ours, reference, dtype)
    assert graphs.capture_for(mine.decoder, torch.device("cpu"), None) is object
    assert {p.dtype for p in mine.decoder.parameters()} == {dtype or torch.float32}
    assert {p.dtype for p in theirs.parameters()} == {dtype or torch.float32}
    assert ours.projector.weight.dtype == torch.float32


@pytest.mark.parametrize("recorded", [False, True])
def test_the_loops_are_measured_with_recordings_and_without(recorded, tmp_path, monkeypatch):
    made = []

    class Recording(RecordedOperations):
        def __init__(self, step, device):
            super().__init__(step, device)
            made.append(self)

    if recorded:
        monkeypatch.setitem(recorded_step.CAPTURES, "cpu", Recording)
    out = tmp_path / "loops.json"
    common = ["--device", "cpu", "--tiny", "--output", str(out)]
    assert loops.main(["train", "--batches", "4", "--steps", "8", *common]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["recorded", "launched"]
    assert bool(made) == recorded
    assert all(row["ms"] > 0 and row["profiled"]["host_ms"] > 0 for row in rows)
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-2)
    assert loops.main(["decode", "--batches", "2", "--seconds", "0", *common]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["can_record"] for row in rows] == [recorded, False]
    assert all(row["same_tokens"] for row in rows)


def test_stages_fit_the_budget_in_the_order_of_their_worth(gpu_check):
    names = [stage.name for stage in gpu_check.STAGES]
    wanted = ["environment", "build", "tests", "loop_tests", "training", "decoding", "benchmarks"]
    assert names[: len(wanted)] == wanted
    assert sum(stage.least for stage in gpu_check.STAGES) <= 0.8 * 520
    context = type("Context", (), {"dry": True})()
    for stage in gpu_check.STAGES:
        if stage.name in ("training", "decoding", "counters", "benchmarks", "end_to_end", "large", "sanitizer"):
            assert stage.run(context, 1.0)["status"] == "skipped"


def test_dry_run_and_a_machine_without_a_device(gpu_check, tmp_path, monkeypatch, capsys):
    facts = {"torch": "2.11.0", "triton": "3.6.0", "available": False}
    monkeypatch.setattr(sys.modules["gpu_stages"], "_FACTS", f"print('FACTS ' + {json.dumps(json.dumps(facts))})")
    only = [s for s in gpu_check.STAGES if s.name in ("environment", "sanitizer")]
    assert gpu_check.main(["--output", str(tmp_path), "--dry-run", "--commit", "abc"], only) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["environment"]["facts"]["commit"] == "abc"
    assert summary["stages"]["sanitizer"]["status"] == "skipped"
    assert gpu_check.main(["--output", str(tmp_path)], only) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "summary.json").read_text())["stages"]) == ["environment"]


def test_everything_fits_nine_minutes_and_eight_files(gpu_check):
    assert sum(s.least for s in gpu_check.STAGES) < 520 < 9 * 60
    assert gpu_check.LOG_BYTES < 16 << 20
