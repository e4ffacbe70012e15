"""``make test-peers``: tests of tests/integrations and examples that are skipped where their framework is not installed."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from benchmarks.common.environments import peer_python
from benchmarks.common.records import ROOT

pytestmark = pytest.mark.peers

INTEGRATIONS = "tests/integrations"


@pytest.mark.parametrize(
    ("environment", "tests"),
    [
        ("pythae", ("test_pythae.py", "test_versions.py", "test_page.py")),
        ("frameworks", ("test_hub.py", "test_normalizing_flows.py", "../examples/test_examples.py::test_lightning")),
    ],
)
def test_with_the_framework_installed_all_of_them_pass(environment, tests):
    command = [str(peer_python(environment)), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(os.path.normpath(f"{INTEGRATIONS}/{name}") for name in tests)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    summary = run.stdout.splitlines()[-1] if run.stdout else ""
    assert run.returncode == 0 and re.search(r"\d+ passed", summary), run.stdout[-3000:] + run.stderr[-1000:]
    assert "skipped" not in summary, run.stdout[-3000:]
