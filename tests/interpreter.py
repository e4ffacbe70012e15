"""Triton's interpreter without work that it does over and over."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def quicken() -> None:
    """Put the interpreter's form of the language in its place once a launch.

    It does so at every call of a function inside a kernel too, for a third of a millisecond each time. Leaves an interpreter
    that is made otherwise as it is.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("GridExecutor", "_LangPatchScope", "_patch_lang", "tl")):
        return
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
