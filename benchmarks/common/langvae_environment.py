"""LangVAE 0.6.13 in a virtual environment of its own: it needs another transformers than this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common.records import ROOT
from benchmarks.common.worker import Worker

VENV = ROOT / ".venv-langvae"
# torch first, so that langvae finds its requirement met and brings no other build.
PACKAGES = ("torch==2.13.0", "langvae==0.6.13")


class LangVAEMissing(RuntimeError):
    """LangVAE's environment cannot be made here; the message says why."""


def langvae_python() -> Path:
    """The interpreter of LangVAE's virtual environment, made on first use. Raises LangVAEMissing."""
    python, marker = VENV / "bin" / "python", VENV / ".ready"
    if marker.exists():
        return python
    if sys.version_info < (3, 11):
        raise LangVAEMissing(f"LangVAE 0.6.13 needs Python >= 3.11, this is {sys.version.split()[0]}")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        for package in PACKAGES:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise LangVAEMissing(f"its virtual environment cannot be built ({error})") from error
    marker.touch()
    return python


def langvae_worker(script: Path, case: Path, environment: dict[str, str]) -> Worker:
    """A process that runs ``script`` on a case under LangVAE's interpreter; ``worker`` is importable there.

    Raises LangVAEMissing.
    """
    # This folder alone, not the repository's root: LangVAE's environment must see no other module of ours.
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    return Worker([str(langvae_python()), str(script), str(case)], {**environment, **path}, "LangVAE")
