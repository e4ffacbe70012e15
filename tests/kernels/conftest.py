"""Every kernel test runs with uninitialised memory filled with NaN, so that an unwritten output shows."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """at::empty and torch.empty give NaN (largest int for integers), in Python, C++ and Triton launchers alike."""
    if "no_poison" in request.keywords:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled
