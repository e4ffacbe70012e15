"""Methods of attention modules exchanged by the name of their class, in effect only while a call of ours is under way."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from lmvae_fast.models.decoder.running import running

Method = Callable[..., Any]
_methods: dict[str, tuple[str, Method]] = {}


def exchanges(*classes: str, method: str = "forward") -> Callable[[Method], Method]:
    """Decorates what is called as ``method`` of these classes of transformers; it gets the module and the call's arguments.

    classes: names, or ``file.name`` where many families have a class of that name (``modeling_openai.Attention``).
    """

    def register(function: Method) -> Method:
        for name in classes:
            _methods[name] = (method, function)
        return function

    return register


def exchange_attention(body: nn.Module) -> int:
    """Exchange the attention methods of a decoder's body that an adapter knows; how many there were.

    Modules that do not say which layer they are learn it by their order.
    """
    _load()
    found = [(module, known) for module in body.modules() if (known := _known(type(module))) is not None]
    for layer, (module, (name, function)) in enumerate(found):
        if not hasattr(module, "layer_idx"):
            module.layer_idx = layer  # type: ignore[assignment]
        _exchange(module, name, function)
    return len(found)


def _known(kind: type) -> tuple[str, Method] | None:
    return _methods.get(kind.__name__) or _methods.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")


def exchange_positions(body: nn.Module) -> int:
    """Have a body that takes no position ids read ours where it looks positions up; how many modules do that.

    BART's kind counts from the length of its cache, and its embedding of positions takes them as an argument all the same.
    """
    modules = [
        module
        for module in body.modules()
        if {"past_key_values_length", "position_ids"} <= inspect.signature(type(module).forward).parameters.keys()
        and not any(True for _ in module.children())
    ]
    for module in modules:
        _exchange(module, "forward", _at_our_positions)
    return len(modules)


def _at_our_positions(module: nn.Module, *args: Any, **options: Any) -> Any:
    call = running()
    assert call is not None
    return type(module).forward(module, *args, **{**options, "position_ids": call.positions})


def _exchange(module: nn.Module, name: str, function: Method) -> None:
    def exchanged(self: nn.Module, *args: Any, **options: Any) -> Any:
        if running() is None:
            return getattr(type(self), name)(self, *args, **options)
        return function(self, *args, **options)

    # A bound method of the instance: a deep copy of the module then has its own.
    module.__dict__[name] = MethodType(exchanged, module)


@cache
def _load() -> None:
    package = __name__.rpartition(".")[0]
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{file.name}")
