"""Checks that exist on a CUDA device only: no host synchronisation, capture in a graph, addresses past 2^31."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.kernels.common import lay_out, on_backend, run_with_grads

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 0x1234_5678_9ABC_DEF0


def cuda(tensors: Sequence[torch.Tensor], layout: str = "dense") -> list[torch.Tensor]:
    """The tensors on the device, each laid out there (a copy between devices would drop the gaps of a layout)."""
    flat = "dense" if layout == "transposed" else layout  # one dimension has no strides to swap
    return [lay_out(x.detach().cuda(), layout if x.dim() > 1 else flat) for x in tensors]


def triton(function: Callable[..., Any]) -> Callable[..., Any]:
    return on_backend(function, "triton")


@contextmanager
def no_host_sync():
    """The block raises RuntimeError where it would make the host wait for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_no_host_sync(function: Callable[..., Any], inputs: Sequence[torch.Tensor], **kwargs: Any) -> None:
    """Neither the call nor its backward waits. The first run compiles and uploads tables, which may."""
    _, _, weights = run_with_grads(function, inputs, **kwargs)
    with no_host_sync():
        run_with_grads(function, inputs, weights, **kwargs)


def capture(function: Callable[[], Any], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`function` in a CUDA graph, after runs beside the main stream; returns the graph and what the captured run gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


def assert_replays(function: Callable[..., Any], inputs: Sequence[torch.Tensor], **kwargs: Any) -> None:
    """A captured forward and backward gives, for new values written into its inputs, what a plain run gives for them."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    _, _, weights = run_with_grads(function, inputs, **kwargs)
    wanted = [x for x in leaves if x.requires_grad]

    def step():
        outputs = function(*leaves, **kwargs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        pairs = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], wanted, [w for _, w in pairs])
        return [o.detach() for o in outputs], grads

    graph, (outputs, grads) = capture(step)
    with torch.no_grad():
        for x in wanted:
            x.mul_(0.5).add_(0.125)
    graph.replay()
    torch.cuda.synchronize()
    plain_outputs, plain_grads, _ = run_with_grads(function, [x.detach() for x in leaves], weights, **kwargs)
    for ours, plain in zip([*outputs, *grads], [*plain_outputs, *plain_grads], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def far_apart(x: torch.Tensor, free: int) -> torch.Tensor:
    """The same values with the rows of dimension 0 so far apart that the last one lies more than 2^31 elements in.

    Skips where the device has not the memory. free: its free bytes.
    """
    rows = x.shape[0]
    assert rows > 1, "one row has no distance"
    inner = x.numel() // rows
    step = -(-(2**31 + 4096) // (rows - 1))
    size = step * (rows - 1) + inner
    if size * x.element_size() > 0.8 * free:
        pytest.skip(f"needs {size * x.element_size() / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # what lies between the rows is never read
    try:
        storage = torch.empty(size, dtype=x.dtype, device="cuda")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    view = storage.as_strided((rows, *x.shape[1:]), (step, *x[0].contiguous().stride()))
    assert view[-1].data_ptr() - view.data_ptr() > 2**31 * x.element_size()
    return view.copy_(x)


def assert_same_far_apart(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], which: Sequence[int], free: int, **kwargs: Any
) -> None:
    """Bit for bit the same outputs and gradients when each of inputs[which] in turn is spread over more than 2^31 elements."""
    outputs, grads, weights = run_with_grads(function, inputs, **kwargs)
    for place in which:
        spread = [far_apart(x, free) if i == place else x for i, x in enumerate(inputs)]
        far_outputs, far_grads, _ = run_with_grads(function, spread, weights, **kwargs)
        for ours, plain in zip([*far_outputs, *far_grads], [*outputs, *grads], strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)
        del spread, far_outputs, far_grads
        torch.cuda.empty_cache()
