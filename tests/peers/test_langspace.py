"""``make test-peers``: LangSpace 0.3.7's own probes, unmodified, on our LangVAE."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.common.environments import peer_python
from tests.integrations.langvae.parts_on_disk import build, write_parts

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("langspace")
    model = build(write_parts(root))
    assert model.lmvae is not None  # settles the number of labels
    model.save(root / "model")
    child, output = Path(__file__).with_name("langspace_child.py"), root / "results.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(peer_python("langspace")), str(child), str(root / "model"), str(output)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(output.read_text())


def test_interpolation_traversal_and_arithmetic(results):
    assert results["interpolation"] == {
        "rows": 3, "columns": ["source", "target", "distance", "generate"], "steps": 11
    }  # fmt: skip
    assert results["traversal"] == {"rows": 2 * 2 * 3, "columns": ["seeds", "dim", "distance", "generate"]}
    assert results["arithmetic"] == {"rows": 9, "columns": ["source", "target", "op", "generate"]}


@pytest.mark.parametrize("metric", ["Z_DIFF", "Z_MIN_VAR", "MIG", "COMPLETENESS", "INFORMATIVENESS"])
def test_disentanglement(results, metric):
    found = results[f"disentanglement {metric}"]
    assert "error" not in found, found
    assert found["rows"] == 1 and found["columns"]
