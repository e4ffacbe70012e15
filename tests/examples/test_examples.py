"""Every example runs as it stands, offline and in seconds, and is short enough to be read at one sitting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmvae_fast as lf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, run in a process of its own without the network."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_and_says_how_it_is_run(file):
    text = file.read_text()
    assert len(text.splitlines()) < 40
    assert f"python examples/{file.name}" in text
    assert f'run("{file.name}"' in Path(__file__).read_text(), "no test runs it"


def test_quickstart():
    out = run("quickstart.py")
    assert [line[:4] for line in out.splitlines() if re.match(r"\d\.\d\d  ", line)] == [
        "0.00",
        "0.25",
        "0.50",
        "0.75",
        "1.00",
    ]
    fast, plain = map(float, re.search(r"loss ([\d.]+), in plain torch ([\d.]+)", out).groups())
    assert fast == pytest.approx(plain, rel=1e-5)
    assert all(f"from the prior: {index}" in out for index in range(3))


def test_train_and_the_quickstart_on_what_it_leaves(tmp_path):
    out = run("train.py", str(tmp_path / "run"))
    assert "at step 30" in out and "active units" in out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    model = lf.LMVAE.from_pretrained(tmp_path / "run" / "model")
    assert model.config.latent_dim == 16
    assert "KL to the prior" in run("quickstart.py", str(tmp_path / "run" / "model"))


def test_kernels():
    losses = [float(value) for value in re.findall(r"step \d+: ([\d.]+)", run("kernels.py"))]
    assert len(losses) == 4 and losses[-1] < losses[0] / 10


def test_lightning():
    pytest.importorskip("lightning")
    assert "loss " in run("lightning_module.py", "6")
