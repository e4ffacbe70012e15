"""The part of a training step, or of decoding, that runs now: forward by hooks, backward by autograd's sequence numbers.

Every node of the graph carries the number it was made with, and the numbers of a forward pass only grow. So where the
forward pass changed from one part to the next divides the backward pass too, and no kernel needs to know of it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lmvae_fast.generation import decode_rows
from lmvae_fast.kernels.packed_linear import PackedLinear
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.decode_body import DecodeBody
from lmvae_fast.models.decoder.linear_weights import Linear
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.reference.langvae import ReferenceLangVAE
from lmvae_fast.reference.optimus import ReferenceOptimus
from lmvae_fast.reference.stepwise import StepwiseDecoder

PARTS = ("encoder", "posterior", "latent_kv", "body", "head", "optimizer", "other")
#: Of decoding. ``products``: the linear maps of the decoder's layers; ``layers``: all else in them but attention;
#: ``choosing``: the draw (a greedy token comes out of the head).
DECODING_PARTS = ("latent_kv", "products", "attention", "layers", "head", "choosing", "other")
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
    """Let forward passes of ``model`` (an LMVAE or an eager reference) switch the parts, within this block."""
    with _Switches(parts) as on:
        if isinstance(model, LMVAE):
            on.module(model, "posterior", "other")
            on.module(model.encoder, "encoder", "posterior")
            on.module(model.projector, "latent_kv", "body")
            on.module(model.embedding_shift, "latent_kv", "body")
            on.module(model.decoder.body, "body", "head")
        elif isinstance(model, (ReferenceLangVAE, ReferenceOptimus)):
            on.module(model.encoder, "encoder", "posterior")
            on.module(model.linear, "posterior", "posterior")
            on.module(model.decoder, "body")
            on.module(model.decoder.base_model, "body", "head")
            if isinstance(model, ReferenceLangVAE):
                for linear in model.context_hidden:
                    on.module(linear, "latent_kv")
            else:
                on.module(model.linear_memory, "latent_kv", "body")
                on.module(model.linear_embedding, "latent_kv", "body")
            # what a step of the sequential decoder does around its model is the cache's and the mask's business
            on.function(StepwiseDecoder, "step", "body", "head")
        else:
            raise TypeError(f"parts of a {type(model).__name__} are not known")
        yield


@contextlib.contextmanager
def as_part(parts: Parts, part: str, owner: Any, *names: str) -> Iterator[None]:
    """Let the named methods of ``owner`` (an instance) run as ``part``, within this block."""
    with _Switches(parts) as on:
        for name in names:
            on.function(owner, name, part, "other")
        yield


@contextlib.contextmanager
def watching_decoding(parts: Parts, model: LMVAE) -> Iterator[None]:
    """Let ``generate`` with this model switch the parts of DECODING_PARTS, within this block."""
    body = model.decoder.body
    with _Switches(parts) as on:
        on.callback(setattr, DecodeBody, "in_use", DecodeBody.in_use)
        DecodeBody.in_use = False
        on.function(model, "inject", "latent_kv", "other")
        on.function(LatentCache, "place", "latent_kv", "other")
        on.module(body, "layers", "head")
        for module in body.modules():
            if isinstance(module, Linear):
                on.module(module, "products", "layers")
        on.function(PackedLinear, "__call__", "products", "layers")
        on.function(LatentCache, "attend", "attention", "layers")
        on.function(model.decoder, "greedy_tokens", "head", "other")
        on.function(decode_rows, "sample_token", "choosing", "other")
        yield


class _Switches(contextlib.ExitStack):
    """Makes modules and functions switch the parts before and after they run, until the stack is left."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.callback(parts.close)

    def module(self, module: nn.Module | None, before: str, after: str | None = None) -> None:
        """Switch to ``before`` where the module begins, to ``after`` where it ends; None: the part goes on behind it."""
        if module is None:
            return
        switch = self.parts.switch
        self.callback(module.register_forward_pre_hook(lambda *_: switch(before)).remove)
        if after is not None:
            self.callback(module.register_forward_hook(lambda *_: switch(after)).remove)

    def function(self, owner: Any, name: str, part: str, after: str) -> None:
        """Run ``owner.name`` as ``part``, and ``after`` behind it; ``owner`` is a class, a module or an instance."""
        function, own = getattr(owner, name), name in vars(owner)
        self.callback(setattr, owner, name, function) if own else self.callback(delattr, owner, name)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.parts.switch(part)
            out = function(*args, **kwargs)
            self.parts.switch(after)
            return out

        setattr(owner, name, run)
