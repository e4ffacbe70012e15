"""Triton's interpreter without work that it does over and over."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def quicken() -> None:
    """Take out of the interpreter what costs most of its time and changes nothing: see the functions below.

    Leaves an interpreter that is made otherwise as it is.
    """
    try:
        from triton.language import core, semantic
        from triton.runtime import interpreter
    except ImportError:
        return
    for change, needs in (
        (_language_in_place_once, [(interpreter, ("GridExecutor", "_LangPatchScope", "_patch_lang", "tl"))]),
        (_overflow_unlooked_for, [(semantic.TritonSemantic, ("binary_op_sanitize_overflow_impl",))]),
        (_shapes_once, [(core, ("block_type", "tensor", "constexpr", "base_value", "tuple"))]),
        (_numpy_types_once, [(interpreter, ("_get_np_dtype",))]),
    ):
        if all(hasattr(place, name) for place, names in needs for name in names):
            change()


def _language_in_place_once() -> None:
    """Put the interpreter's form of the language in its place once a launch: it does so at every call of a function inside a
    kernel too, for a third of a millisecond each time."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language = (interpreter.tl, interpreter.tl.core)
    in_place: list[set[tuple[int, ...]]] = []  # by launch, which parts of the language

    @cache
    def parts_of(fn: Any) -> tuple[int, ...]:
        return tuple(sorted({id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in language}))

    def patch_once(fn: Any) -> Any:
        parts = parts_of(fn)
        if in_place and parts in in_place[-1]:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if in_place:
            in_place[-1].add(parts)
        return scope

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        in_place.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            in_place.pop()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_once


def _overflow_unlooked_for() -> None:
    """Every sum and product of integers is computed again in 64 bits and compared, ten operations in all, for an assertion
    that is made with the option `debug` alone."""
    from triton.language import semantic

    kind = semantic.TritonSemantic
    check = kind.binary_op_sanitize_overflow_impl

    def check_where_asserted(self: Any, *args: Any) -> None:
        if self.builder.options.debug:
            check(self, *args)

    kind.binary_op_sanitize_overflow_impl = check_where_asserted


def _shapes_once() -> None:
    """A block's type checks its shape and writes it out, and its tensor wraps each length: once for every shape."""
    from triton.language import core

    of_type, of_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensors: dict[int, tuple[Any, Any]] = {}  # by the identity of a type's shape, which `types` keeps; 0: of a number

    def type_(self: Any, element_ty: Any, shape: Any) -> None:
        found = None
        if known := isinstance(shape, list | core.tuple):  # what it takes; anything else it refuses itself
            lengths = tuple(getattr(length, "value", length) for length in shape)
            known = all(type(length) is int for length in lengths)
            found = types.get(lengths) if known else None
        if found is None:
            of_type(self, element_ty, shape)
            if known:
                types[lengths] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = found
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        block = isinstance(type, core.block_type)
        key = id(type.shape) if block else 0
        found = tensors.get(key)
        if found is None:
            of_tensor(self, handle, type)
            if not block or any(type.shape is kept for kept, *_ in types.values()):
                tensors[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    core.block_type.__init__, core.tensor.__init__ = type_, tensor


def _numpy_types_once() -> None:
    """The table of numpy's types is made anew at every look into it."""
    from triton.language import core
    from triton.runtime import interpreter

    of = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_type(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, core.block_type) else kind
        if isinstance(scalar, core.pointer_type):
            return of(kind)
        if scalar.name not in known:
            known[scalar.name] = of(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_type
