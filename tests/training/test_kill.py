"""Training killed with SIGKILL at twenty random points, and resumed each time, ends with the same bits.

Whole models: `make kill`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", ["fake", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lmvae", "flow"))])
def test_twenty_kills(tmp_path, model):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    # the fake model's time is mostly saving: kills of both kinds are had for the asking
    places = ["while saving", "between checkpoints"] if model == "fake" else []
    command = [sys.executable, "-m", "tests.training.kill_server", str(tmp_path), "20", "0", model, *places]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(report["kills"].values()) >= 20
    assert set(places) <= set(report["kills"]), report
