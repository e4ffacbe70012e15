"""What all configurations share: checks of single fields, dictionaries and files in and out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lmvae_fast.documents import parse_json, parse_yaml, read_text
from lmvae_fast.errors import ConfigError, OutputError

Config = TypeVar("Config", bound="ConfigBase")


class ConfigBase:
    """What all configurations share: conversion to and from dictionaries and files."""

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build from a mapping; raises ConfigError naming every field that does not exist."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [str(name) for name in values if name not in known]
        if unknown:
            close = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
            hints = ", ".join(f"{name} -> {match[0]}" for name, match in close.items() if match)
            raise ConfigError(
                f"unknown field(s) in {cls.__name__}",
                value=", ".join(unknown),
                limit=", ".join(known),
                remedy=f"did you mean {hints}?" if hints else "remove them",
            )
        # JSON and YAML have lists where we keep tuples (frozen, hashable).
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that :meth:`from_dict` reads back; tuples become lists."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def replace(self: Config, **changes: Any) -> Config:
        """A copy with some fields changed (checked like a new one)."""
        return type(self).from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_file(cls: type[Config], path: str | os.PathLike[str]) -> Config:
        """Read from a ``.json``, ``.yaml`` or ``.yml`` file."""
        return cls.from_dict(read_mapping(path))

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON or YAML, by the file's ending. Raises OutputError when the file cannot be written."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error}", remedy="choose a writable place") from error

    def _choice(self, name: str, allowed: tuple[str, ...], optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1)
            raise ConfigError(
                f"{type(self).__name__}.{name} is not a known value",
                value=repr(value),
                limit=", ".join(allowed),
                remedy=f"did you mean {close[0]!r}?" if close else "choose one of those",
            )

    def _flag(self, *names: str) -> None:
        """Booleans, or None where that is the default: the string "false" would count as true."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and fields[name] is None):
                raise ConfigError(
                    f"{type(self).__name__}.{name} is no truth value",
                    value=repr(value),
                    limit="true or false",
                    remedy="change it",
                )

    def _text(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (isinstance(value, str) and value) and not (optional and value is None):
            raise ConfigError(
                f"{type(self).__name__}.{name} must be a name or path", value=repr(value), limit="a non-empty string"
            )

    def _number(
        self,
        name: str,
        low: float | None = None,
        high: float | None = None,
        *,
        integer: bool = False,
        optional: bool = False,
        open_low: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        kind = "an integer" if integer else "a finite number"
        allowed = f"{kind}" + (f" {'>' if open_low else '>='} {low}" if low is not None else "")
        allowed += f" and <= {high}" if high is not None else ""
        good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
        good = good and value == value and abs(value) != float("inf")
        good = good and (low is None or (value > low if open_low else value >= low)) and (high is None or value <= high)
        if not good:
            raise ConfigError(
                f"{type(self).__name__}.{name} is out of range", value=repr(value), limit=allowed, remedy="change it"
            )


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; raises ConfigError if there is none."""
    path = Path(path)
    text = read_text(path, error=ConfigError, most="configuration")
    parse = parse_json if path.suffix == ".json" else parse_yaml
    values = parse(text, str(path), error=ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a mapping", value=type(values).__name__, limit="field: value lines")
    return values
