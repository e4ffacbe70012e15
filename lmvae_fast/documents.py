"""The one reader of JSON and the one of YAML: for configurations, manifests, states, data, latents and metrics.

Stricter than the libraries beneath: a key twice, lists within lists without end, integers of thousands of digits and aliases
that stand for billions of values are errors of the caller's kind, never a traceback or a full memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from lmvae_fast.errors import ConfigError, DataError, LMVAEError
from lmvae_fast.limits import limit, refuse

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_AGAIN = "restore it from a copy, or mend it"


class _TooLong(ValueError):
    pass


class _Twice(ValueError):
    pass


def check_regular(path: str | os.PathLike[str], *, error: type[LMVAEError] = DataError, what: str = "file") -> Path:
    """The path, of an ordinary file: a pipe or a device could be waited for without end. Raises ``error`` otherwise."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise error(
            f"cannot read, there is no {what} {path} (it is missing)",
            value=f"working folder {Path.cwd()}",
            remedy="check the path",
        ) from None
    except (OSError, ValueError) as problem:  # ValueError: a byte 0 in the name
        raise error(f"cannot open the {what} {path}: {problem}", remedy="check the path and its permissions") from None
    if stat.S_ISDIR(mode):
        raise error(f"{path} is a folder", limit=f"a {what}", remedy="name a file in it")
    if not stat.S_ISREG(mode):
        raise error(
            f"{path} is no ordinary file", value="a pipe, socket or device", limit=f"a {what} on a disk",
            remedy="write its content to a file first",
        )  # fmt: skip
    return path


def read_text(path: str | os.PathLike[str], *, error: type[LMVAEError] = DataError, most: str = "document") -> str:
    """The text of an ordinary UTF-8 file, without a byte-order mark.

    most: name of the limit on its size. Raises ``error`` for a file that is missing, no ordinary one, too large, no UTF-8, or
    with a byte 0, which UTF-16 is full of.
    """
    path = check_regular(path, error=error)
    try:
        with open(path, "rb") as file:
            content = file.read(limit(most) + 1)
    except OSError as problem:
        raise error(f"cannot read {path}: {problem}", remedy="check its permissions") from problem
    if len(content) > limit(most):
        raise refuse(most, f"{path} is too large", f"over {limit(most)} bytes", error=error)
    if b"\0" in content:
        form = (
            "utf-16"
            if content[:2] in (b"\xff\xfe", b"\xfe\xff")
            else "utf-16le"
            if content.index(0) % 2
            else "utf-16be"
        )
        raise error(
            f"{path}: there is a byte 0, which text does not have: it is UTF-16, or no text",
            value=f"byte 0 at byte {content.index(0)}",
            remedy=f"for UTF-16 convert the file, for example with: iconv -f {form} -t utf-8",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{path} is not UTF-8", value=f"byte 0x{content[problem.start]:02x} at byte {problem.start}",
            remedy="convert the file, for example with: iconv -f latin1 -t utf-8",
        ) from None  # fmt: skip


def read_json(path: str | os.PathLike[str], *, error: type[LMVAEError] = DataError, most: str = "configuration") -> Any:
    """The value in a JSON file. Raises ``error`` for one that :func:`read_text` or :func:`parse_json` refuses."""
    return parse_json(read_text(path, error=error, most=most), str(path), error=error)


def read_object(path: str | os.PathLike[str], *, error: type[LMVAEError] = DataError) -> dict[str, Any]:
    """The object in a JSON file. Raises ``error`` for one that :func:`read_json` refuses, and for another value."""
    value = read_json(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} does not hold an object", value=type(value).__name__, limit="a JSON object", remedy=_AGAIN)
    return value


def parse_json(
    text: str, place: str, *, error: type[LMVAEError] = DataError, remedy: str = _AGAIN, limit_text: Any = None
) -> Any:
    """The value of a JSON text.

    Args:
        text: what is read; place: where it stands, for messages; error, remedy, limit_text: of what is raised.

    Raises ``error`` for a text that is no JSON, has a key twice in an object, or is over the limits on nesting and digits.
    """
    try:
        value = json.loads(text.removeprefix(_BOM), object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise refuse(
            "nesting",
            f"{place}: malformed, with too many levels within one another",
            "more",
            error=error,
            unit="levels",
        ) from None
    except _TooLong as problem:
        raise refuse("digits", f"{place}: an integer is too long", str(problem), error=error, unit="digits") from None
    except _Twice as problem:
        raise error(f"{place}: a key twice in one object", value=str(problem), remedy=remedy) from None
    except ValueError as problem:
        where = ""
        if isinstance(problem, json.JSONDecodeError):
            where = f" at line {problem.lineno}, character {problem.colno}" if problem.lineno > 1 else ""
            where = where or f" at character {problem.colno}"
            reason = problem.msg
        else:
            reason = str(problem)
        raise error(
            f"{place}: malformed JSON{where}, which cannot be read: {reason}",
            value=text[:80].strip() or None,
            limit=limit_text,
            remedy=remedy,
        ) from None
    if text.count("[") + text.count("{") > limit("nesting"):
        _check_nesting(value, place, error)
    return value


def parse_yaml(text: str, place: str = "the YAML text", *, error: type[LMVAEError] = ConfigError) -> Any:
    """The value of a YAML text (1.1, with the numbers of 1.2: ``1e-3`` is one).

    Raises ``error`` for a text that is no YAML, has a key twice in a mapping, makes objects, or is over the limits on
    nesting and on values with their aliases written out.
    """
    loader = None
    try:
        loader = _Yaml(text.removeprefix(_BOM))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, place, error)
        return loader.construct_document(node)
    except LMVAEError:
        raise
    except RecursionError:
        raise refuse(
            "nesting",
            f"{place}: malformed, with too many levels within one another",
            "more",
            error=error,
            unit="levels",
        ) from None
    except Exception as problem:  # its constructors fail in many ways: a date of month 13, !!bool "maybe"
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise error(f"{place} is not valid YAML: {reason[:300]}", remedy="mend it, or quote the value") from None
    finally:
        if loader is not None:
            loader.dispose()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        raise _Twice(next(repr(key)[:80] for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _integer(digits: str) -> int:
    if len(digits) > limit("digits"):
        raise _TooLong(f"{len(digits)} digits")
    return int(digits)


def _check_nesting(value: Any, place: str, error: type[LMVAEError]) -> None:
    most, level, depth = limit("nesting"), [value], 0
    while level:
        depth += 1
        if depth > most + 1:
            raise refuse(
                "nesting",
                f"{place}: malformed, with too many levels within one another",
                "more",
                error=error,
                unit="levels",
            )
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, (dict, list)))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, (dict, list)))
        level = inner


class _Yaml(yaml.SafeLoader):
    """The safe loader that refuses a key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    value = self.construct_object(key)
                    if value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"key {value!r} twice", key.start_mark)
                    seen.add(value)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _check_nodes(root: Any, place: str, error: type[LMVAEError]) -> None:
    """Size and depth of a document whose aliases are written out; a node within itself is refused."""
    known: dict[int, tuple[int, int]] = {}  # by node: values in it, levels in it
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        name = id(node)
        inner = _inner(node)
        if done:
            open_nodes.discard(name)
            sizes = [known[id(child)] for child in inner]
            values, levels = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
            if values > limit("nodes"):
                raise refuse("nodes", f"{place}: aliases stand for too many values", "more", error=error, unit="values")
            if levels > limit("nesting") + 1:
                raise refuse("nesting", f"{place}: too many levels in one another", levels, error=error, unit="levels")
            known[name] = values, levels
        elif name in open_nodes:
            raise error(f"{place}: an alias stands within what it names", remedy="write it out")
        elif name not in known:
            open_nodes.add(name)
            stack.append((node, True))
            stack.extend((child, False) for child in inner)
    return


def _inner(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
