"""A step recorded once and replayed, so that the host launches one graph where it would launch hundreds of kernels.

A recording holds kernels and addresses, nothing else: the step must work in place on tensors that stay where they are, and
must not look at a value on the host. What cannot be recorded, or gives other tokens recorded than run, is run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.backend import current

logger = logging.getLogger(__name__)

PLAIN_STEPS = 2  # of a batch size before its step is recorded: a batch that ends at once needs no recording


class Graph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Do the recorded work once more, on the values that its tensors hold now."""
        ...


Step = Callable[[], None]
Capture = Callable[[Step, torch.device], Graph]


class CudaGraph:
    """A step as a CUDA graph, done once while it is recorded; ``pool``: of memory that several graphs share.

    Raises RuntimeError where it cannot be one, a step that waits for the device among them.
    """

    def __init__(self, step: Step, device: torch.device, *, pool: Any = None):
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # A capture that breaks off may leave torch's random generator in it, so what would break it is looked for first.
            with torch.cuda.stream(stream), _never_waiting():
                step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()

    def replay(self) -> None:
        """See :class:`Graph`."""
        self.graph.replay()


@contextmanager
def _never_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


#: How a step is recorded, by the type of its device.
CAPTURES: dict[str, Capture] = {"cuda": CudaGraph}
_refused: WeakSet[nn.Module] = WeakSet()  # decoders whose steps could not be recorded: tried, and said, once


def capture_for(
    decoder: nn.Module, device: torch.device, wanted: bool | None, *, in_autocast: bool = False
) -> Capture | None:
    """What records this decoder's steps; None where nothing can, or nothing is to (``GenerationConfig.cuda_graphs``).

    in_autocast: also under autocast, for whoever stays in it from the recording to the last replay.

    Raises:
        ConfigError: a recording is wanted and the device has none.
    """
    capture = CAPTURES.get(device.type)
    if wanted and capture is None:
        raise ConfigError(
            "cuda_graphs records the decode step of a CUDA device",
            value=str(device),
            remedy="leave cuda_graphs at None, which records where it can",
        )
    off = wanted is False or (wanted is None and current() == "reference") or decoder in _refused
    # What is recorded under autocast computes in its dtype ever after, also for callers that have left it.
    return None if off or capture is None or (torch.is_autocast_enabled(device.type) and not in_autocast) else capture


def without_copies(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but without the copies of weights that it keeps until it is left: a recording would go on reading
    them afterwards."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def baked_in(decoder: nn.Module) -> Hashable:
    """What a recording of a decoder's step holds beside its tensors: where the weights lie, and what runs over them.

    A recording is of use for as long as this stays the same. Weights may change in place.
    """
    weights = tuple((x.data_ptr(), x.dtype) for x in (*decoder.parameters(), *decoder.buffers()))
    code = tuple(
        (
            id(module),
            module.training,
            id(vars(module).get("forward")),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for module in decoder.modules()
    )
    device = next(decoder.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return hash((weights, code, current(), autocast, torch.is_inference_mode_enabled()))


class RecordedStep:
    """A step that is recorded after a few calls, compared once with itself as it is, and replayed from then on.

    Args:
        step: works in place; given the same ``state`` twice it does the same twice.
        state: all tensors that a call moves on.
        capture: records it.
        decoder: whose step it is. May be None while no step is taken, so that what is kept does not keep it alive.
    """

    decoder: nn.Module | None

    def __init__(self, step: Step, state: Sequence[Tensor], capture: Capture, decoder: nn.Module):
        self.step, self.state, self.capture, self.decoder = step, state, capture, decoder
        self.calls = 0
        self.graph: Graph | None = None

    def __call__(self) -> None:
        """One step."""
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.calls == PLAIN_STEPS + 1:
            self._record()
        else:
            self.step()

    def _record(self) -> None:
        before = [x.clone() for x in self.state]
        self.step()
        after = [x.clone() for x in self.state]
        self._restore(before)
        try:
            with without_copies(self.state[0].device.type):
                graph = self.capture(self.step, self.state[0].device)
            self._restore(before)
            graph.replay()
            if all(torch.equal(x, y) for x, y in zip(self.state, after, strict=True)):
                self.graph = graph
                return
            reason = "a replay gave other tokens than the step itself"
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
        if self.decoder is not None:
            _refused.add(self.decoder)
        logger.warning("the decode step is run kernel by kernel instead of as one graph: %s", reason)
        self._restore(after)

    def _restore(self, values: Sequence[Tensor]) -> None:
        for x, value in zip(self.state, values, strict=True):
            x.copy_(value)
