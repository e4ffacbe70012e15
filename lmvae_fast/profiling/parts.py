"""Which part of a training step runs now: forward by module hooks, backward by autograd's sequence numbers.

Every node of the graph carries the number it was made with, and the numbers of a forward pass only grow. So where the
forward pass changed from one part to the next divides the backward pass too, and no kernel needs to know of it.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.reference.langvae import ReferenceLangVAE
from lmvae_fast.reference.optimus import ReferenceOptimus
from lmvae_fast.reference.stepwise import StepwiseDecoder

PARTS = ("encoder", "posterior", "latent_kv", "body", "head", "optimizer", "other")
RANGE = "part:"  # how a part's ranges are named in a trace
_NO_NUMBER = 2**63  # nodes that accumulate gradients have a number beyond all others


class Parts:
    """The current part, and that of every node of the graph.

    ``switch`` ends one part and begins the next; each is a range of the profiler's trace.
    """

    def __init__(self) -> None:
        self._range: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget the graph of the step before."""
        self.close()
        self.current = "other"
        self._numbers: list[int] = []
        self._names: list[str] = []

    def switch(self, part: str) -> None:
        self.close()
        self.current = part
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(part)
        self._range = torch.profiler.record_function(RANGE + part)
        self._range.__enter__()

    def close(self) -> None:
        """End the current range of the trace."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def of_node(self, number: int) -> str:
        """The part whose forward pass made the node of this sequence number."""
        index = bisect.bisect_right(self._numbers, number) - 1
        return self._names[index] if index >= 0 and number < _NO_NUMBER else "other"

    def now(self) -> str:
        """The part that an op running now belongs to, in forward or backward."""
        node = torch._C._current_autograd_node()
        return self.current if node is None else self.of_node(node._sequence_nr())


@contextlib.contextmanager
def watching(parts: Parts, model: nn.Module) -> Iterator[None]:
    """Within this block, forward passes of ``model`` (an LMVAE or an eager reference) switch the parts."""
    with contextlib.ExitStack() as stack:

        def on(module: nn.Module | None, before: str, after: str | None = None) -> None:
            if module is None:
                return
            stack.callback(module.register_forward_pre_hook(lambda *_: parts.switch(before)).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(lambda *_: parts.switch(after)).remove)

        if isinstance(model, LMVAE):
            on(model, "posterior", "other")
            on(model.encoder, "encoder", "posterior")
            on(model.projector, "latent_kv", "body")
            on(model.embedding_shift, "latent_kv", "body")
            on(model.decoder.body, "body", "head")
        elif isinstance(model, (ReferenceLangVAE, ReferenceOptimus)):
            on(model.encoder, "encoder", "posterior")
            on(model.linear, "posterior", "posterior")
            on(model.decoder, "body")
            on(model.decoder.base_model, "body", "head")
            if isinstance(model, ReferenceLangVAE):
                for linear in model.context_hidden:
                    on(linear, "latent_kv")
            else:
                on(model.linear_memory, "latent_kv", "body")
                on(model.linear_embedding, "latent_kv", "body")
            # what a step of the sequential decoder does around its model is the cache's and the mask's business
            stack.callback(setattr, StepwiseDecoder, "step", StepwiseDecoder.step)
            StepwiseDecoder.step = _within(parts, StepwiseDecoder.step, "body", "head")  # type: ignore[method-assign]
        else:
            raise TypeError(f"parts of a {type(model).__name__} are not known")
        try:
            yield
        finally:
            parts.close()


def _within(parts: Parts, function: Callable[..., Any], part: str, after: str) -> Callable[..., Any]:
    """``function`` as a part of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        parts.switch(part)
        out = function(*args, **kwargs)
        parts.switch(after)
        return out

    return run


@contextlib.contextmanager
def as_part(parts: Parts, part: str, owner: Any, *names: str) -> Iterator[None]:
    """Within this block, the named methods of ``owner`` (an instance) run as ``part``."""
    for name in names:
        setattr(owner, name, _within(parts, getattr(owner, name), part, "other"))
    try:
        yield
    finally:
        for name in names:
            delattr(owner, name)
