"""Tests marked `gpu` are skipped where there is no CUDA device, and run with uninitialised memory filled with NaN."""

from __future__ import annotations

import gc
import os

# Read when cuBLAS makes its first handle: the products are then the same bits run after run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.kernels.conftest import _poisoned_memory  # noqa: F401


@pytest.fixture(autouse=True)
def _needs_cuda(request):
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is false")
    torch.cuda.manual_seed_all(0)
    yield
    torch.cuda.synchronize()  # an illegal access shows in the test that made it


@pytest.fixture
def card():
    """Free bytes of the device, with torch's cache given back before and after: for tests that fill it."""
    gc.collect()
    torch.cuda.empty_cache()
    yield torch.cuda.mem_get_info()[0]
    gc.collect()
    torch.cuda.empty_cache()
