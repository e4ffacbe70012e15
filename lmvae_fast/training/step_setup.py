"""What a run sets up for its steps and gives back at its end: the frozen decoder's precision, how its layers run, the
allocator's habits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lmvae_fast.errors import ConfigError
from lmvae_fast.memory import give_back
from lmvae_fast.models.decoder.exchange import called, exchanged

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def castable(decoder: nn.Module) -> list[nn.Parameter]:
    """The decoder's frozen float32 weights that may be held in half precision under autocast.

    Where a part of the decoder trains, matrices only: the vectors of its norms meet activations that may then be float32.
    """
    whole = not any(parameter.requires_grad for parameter in decoder.parameters())
    frozen = [p for p in decoder.parameters() if not p.requires_grad and p.dtype == torch.float32]
    return [parameter for parameter in frozen if whole or parameter.dim() > 1]


@contextlib.contextmanager
def frozen_in(decoder: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """While this lasts, the decoder's frozen float32 weights are held in `dtype` (None: as they are).

    Autocast would otherwise cast every one of them anew at each step. Afterwards the weights are the very tensors they were.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for parameter in castable(decoder) if dtype is not None else ():
        kept.append((parameter, parameter.data))
        parameter.data = parameter.data.to(dtype)
    give_back(data for _, data in kept)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextlib.contextmanager
def recomputing(decoder: nn.Module, wanted: bool) -> Iterator[None]:
    """While this lasts, the decoder keeps only what goes into its layers and computes the rest anew in backward.

    Raises ConfigError for a decoder whose layers transformers does not mark as fit for it.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if wanted and not layers:
        raise ConfigError(
            "the decoder has no layers that can be computed again",
            value=type(decoder).__name__,
            remedy="set recompute_decoder=False",
        )
    for layer in layers if wanted else ():
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers if wanted else ():
            del layer.forward  # the class's own again


@contextlib.contextmanager
def compiling(decoder: nn.Module, wanted: bool) -> Iterator[None]:
    """While this lasts, passes of the decoder's layers that have a backward are compiled by torch.compile.

    Evaluation and greedy passes are not: they would compile for other shapes and kinds of attention. In such a pass, raises
    ConfigError where the compiler fails.
    """
    if not wanted:
        yield
        return
    body: Any = decoder.body
    plain = called(body)
    compiled = torch.compile(plain)

    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **options)
        try:
            return compiled(*arguments, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                "the decoder cannot be compiled here",
                value=str(error).strip().splitlines()[0][:300],
                remedy="set compile=False (on a CPU torch.compile needs a C++ compiler)",
            ) from error

    with exchanged([(body, forward)]):
        yield


@contextlib.contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """While this lasts, memory that the process frees on the CPU stays with it, ready for the next step.

    glibc gives every large block back to the kernel at once and gets it anew, page fault by page fault, at the next step.
    Does nothing on other devices and under other C libraries.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" else None
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
        yield
        return
    assert libc is not None
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
