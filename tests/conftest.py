"""Fixtures for every test: the shared oracle and data, thread counts, hub access off."""

from __future__ import annotations

import os
from pathlib import Path

# No test may reach for the network: a model that is not local is an error, at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.interpreter import quicken

# Without a GPU, Triton kernels run in the interpreter. Triton decides when it is first imported: so here, before any test.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quicken()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracle records and real text beside the repository (not part of it)."""
    folder = Path(os.environ.get("LMVAE_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"oracle and data folder {folder} is absent (set LMVAE_SHARED to its place)")
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
