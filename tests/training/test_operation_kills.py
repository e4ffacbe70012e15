"""Writers killed at every file operation lose nothing, and leave no hole (`make kill`; a few of them in the suite)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]


def kills(folder: Path, most: int, *names: str) -> dict[str, int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.training.operation_kills", str(folder), str(most), *names]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=16 * PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_few(tmp_path):
    assert kills(tmp_path, 4, "save_pretrained", "generate") == {"save_pretrained": 4, "generate": 4}


@pytest.mark.slow
def test_every_operation(tmp_path):
    writers = ("train", "flow", "generate", "save_pretrained", "convert")
    found = kills(tmp_path, 10_000, *writers)
    print(found)
    assert found.keys() == set(writers)
    assert all(found.values()) and sum(found.values()) >= 300, found


@pytest.mark.slow
def test_trainings_of_the_command_line(tmp_path):
    found = kills(tmp_path, 24, "cvae", "llamavae", "finetune")
    assert found == {"cvae": 24, "llamavae": 24, "finetune": 24}
