"""Training killed with SIGKILL at twenty random points, and resumed each time, ends with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", ["fake", "lmvae", "flow"])
def test_twenty_kills(tmp_path, model):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.training.kill_server", str(tmp_path), "20", "0", model]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(report["kills"].values()) >= 20
    if model == "fake":  # whose time is mostly saving: the points must be of both kinds
        assert report["kills"].get("while saving", 0) >= 1, report
        assert report["kills"].get("between checkpoints", 0) >= 1, report
