"""Fixtures of the probes' tests: the records of public implementations beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden(shared) -> Path:
    """The folder of recorded figures."""
    folder = shared / "golden" / "probes"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="session")
def record(golden):
    """Reads a JSON record by its path below the folder; each is read once."""
    read: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in read:
            read[name] = json.loads((golden / name).read_text())
        return read[name]

    return load


@pytest.fixture(scope="session")
def arrays(golden):
    """Reads an .npz by its path below the folder."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(golden / name) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def code(arrays):
    """Latents and factors ``(z, y)`` of a named set; ``srl`` has 32 principal components, ``srl_384`` all."""

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        file = arrays(f"disentanglement/{name.removesuffix('_384')}.npz")
        return (file["z32"] if name == "srl" else file["z"]), file["y"]

    return load
