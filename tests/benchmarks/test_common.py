"""What benchmarks share: LangVAE's side as a process, records, and reports that say what was not tested or measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import chart, highlights
from benchmarks.common import langvae_environment, records, timing
from benchmarks.kernels import harness
from tests.benchmarks.test_generation import MACHINE

SIDE = """
import sys
from worker import serve

class Side:
    def step(self, add=0):
        self.count = getattr(self, "count", 0) + 1
        print("this is no answer")
        return {"count": self.count + add, "case": sys.argv[1], "ours": "benchmarks" in sys.modules}

serve(Side())
"""


def test_langvae_is_asked_in_a_process_that_sees_the_worker_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(langvae_environment, "langvae_python", lambda: Path(sys.executable))
    (tmp_path / "side.py").write_text(SIDE)
    worker = langvae_environment.langvae_worker(tmp_path / "side.py", tmp_path / "case.json", {"OMP_NUM_THREADS": "1"})
    try:
        answer = worker.ask("step", add=10)
        assert answer["count"] == 11 and answer["case"] == str(tmp_path / "case.json") and not answer["ours"]
        counts, seconds = timing.time_request({"LangVAE": worker}, "step", 3, keys=("count", "seconds"))
        assert counts == {"LangVAE": [3, 4, 5]}  # the second call of all is not counted
        assert all(value > 0 for value in seconds["LangVAE"]) and worker.ask("peak")["bytes"] > 10**6
    finally:
        worker.close()


def test_an_environment_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(langvae_environment, "VENV", tmp_path / "venv")

    def fails(command, check):
        raise OSError("no network")

    monkeypatch.setattr(langvae_environment.subprocess, "run", fails)
    with pytest.raises(langvae_environment.LangVAEMissing, match="no network"):
        langvae_environment.langvae_python()
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".ready").touch()
    assert langvae_environment.langvae_python() == tmp_path / "venv" / "bin" / "python"


def test_records_and_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert records.load("generation/langvae.json") is None
    assert chart.picture() is None
    assert highlights.highlights().count("not measured") == 8
    rows = [{"batch": 32, "speedup": {"engine fp32": 2.0, "engine bf16": 3.0}}]
    steps = [
        {"shape": shape, "batch": 32, "speedup": dict.fromkeys(chart.TRAINING, factor)}
        for shape, factor in (("4x256", 9.0), ("gpt2-small", 4.0))
    ]
    records.write({"rows": rows, "machine": MACHINE}, tmp_path / "generation" / "langvae.json")
    records.write({"cases": steps, "machine": MACHINE}, tmp_path / "training" / "steps" / "langvae.json")
    table, picture = highlights.highlights(), chart.picture()
    assert table.count("not measured") == 3 and "| decoding | LangVAE 0.6.13 | 2.0 | every token |" in table
    cases = [{"name": highlights.FLOW, "speedup": 5.0}]
    other = {**MACHINE, "cpu": "another"}
    records.write({"cases": cases, "machine": other}, tmp_path / "kernels" / "coupling_flow.json")
    assert "The flow: another" in highlights.highlights()  # never under the name of a machine it did not run on
    assert picture.count("4.0x") == 3 and "9.0x" not in picture  # of the one shape that is shown
    assert "batch 32 the same tokens, fp32 2.0" in picture  # the text for those who do not see it
    bars = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)" height="15"', picture)]
    assert max(bars) == pytest.approx(2 * min(bars))


def test_a_table_of_ops_says_when_nothing_was_tested():
    record = {"machine": {**MACHINE, "device": "cpu", "python": "3", "uncommitted": False}, "command": "c", "cases": []}
    assert "Not tested" not in harness.markdown("posterior", {**record, "tests": "passed"})
    assert "Not tested" in harness.markdown("posterior", {**record, "tests": "none: there is no tests/ folder"})


def test_a_machine_is_described_where_no_op_was_used_before():
    """Loading the extension must not be left to whatever else a benchmark imports."""
    code = "from lmvae_fast.profiling.measure import machine; print(machine('cpu')['cpu_isa'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-500:]
