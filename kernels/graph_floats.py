"""Floats of primitives in compiled graphs: a number that changes from call to call is an input of the graph.

torch.compile makes a symbol of a Python float that has changed, and can keep it one only where tensors may stand for it. What
takes it as a number gets a graph for every value, until fullgraph=True raises (after eight). So every primitive with floats
has a twin, `<name>_numbers`, that takes 0-dim tensors on the CPU in their place and calls the primitive with what they hold.
A graph calls the twin where a number is a symbol, and the primitive itself where all are constants. The reference is plain
torch and has no twins: it is compiled anew for each value of what it takes as a number and torch.compile cannot keep as a
symbol (docs/debugging.md lists them; a test holds the list).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_twins: dict[str, SimpleNamespace] = {}
_in_graphs: dict[str, SimpleNamespace] = {}
_waiting: list[Callable[..., Any]] = []


def floats(schema: str) -> frozenset[int]:
    """Places of the arguments that are a float, or a float or none."""
    arguments = schema.split("(", 1)[1].rsplit(") ->", 1)[0]
    return frozenset(i for i, argument in enumerate(arguments.split(",")) if argument.split()[0].startswith("float"))


def twin_schema(schema: str) -> str:
    """The twin's schema."""
    name, rest = schema.split("(", 1)
    arguments, results = rest.rsplit(") ->", 1)
    places = floats(schema)
    parts = [part.strip() for part in arguments.split(",")]
    parts = [part.replace("float", "Tensor", 1) if i in places else part for i, part in enumerate(parts)]
    return f"{name.strip()}_numbers({', '.join(parts)}) ->{results}"


def with_numbers(space: str, name: str, places: frozenset[int]) -> Callable[..., Any]:
    """The twin's implementation: the primitive, with the numbers that the tensors hold."""

    def run(*arguments: Any) -> Any:
        plain = getattr(getattr(torch.ops, space), name)
        numbers = (
            x.item() if i in places and isinstance(x, Tensor) else x for i, x in enumerate(arguments)
        )  # on the CPU: nothing waits for a device
        return plain(*numbers)

    return run


def enter(space: str, name: str, places: frozenset[int]) -> None:
    """Make a primitive known to `twins` and `in_graphs`, after its definition and its twin's."""
    plain = getattr(getattr(torch.ops, space), name)
    twin = getattr(getattr(torch.ops, space), f"{name}_numbers") if places else plain
    setattr(_twins.setdefault(space, SimpleNamespace()), name, twin)

    def call(*arguments: Any) -> Any:
        if not any(isinstance(x, torch.SymFloat) for x in arguments):
            return plain(*arguments)
        # a product with a symbol is what the compiler can turn into one of tensors
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return twin(*(one * x if i in places and x is not None else x for i, x in enumerate(arguments)))

    setattr(_in_graphs.setdefault(space, SimpleNamespace()), name, call if places else plain)
    if places:
        _put_into_graphs(call)


def _put_into_graphs(call: Callable[..., Any]) -> None:
    """`torch.compiler.allow_in_graph(call)`, but not before something compiles: it would import torch._dynamo, which takes
    longer than all else that an op needs."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.allow_in_graph(call)
        return
    if not _waiting:
        sys.meta_path.insert(0, _WithDynamo())
    _waiting.append(call)


class _WithDynamo(importlib.abc.MetaPathFinder):
    """Puts the waiting calls into graphs as soon as torch._dynamo has been imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._run, loader.exec_module)
        return spec

    @staticmethod
    def _run(exec_module: Callable[[Any], None], module: Any) -> None:
        exec_module(module)
        while _waiting:
            module.allow_in_graph(_waiting.pop())


def twins(space: str) -> Any:
    """Primitives by name, those with floats as their twins: what a twin's backward calls."""
    return _twins.setdefault(space, SimpleNamespace())


def in_graphs(space: str) -> Any:
    """Primitives by name, as a function that is being compiled calls them."""
    return _in_graphs[space]
