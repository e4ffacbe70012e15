"""How much of what comes from elsewhere is taken before it is refused; every limit has a name by which it is raised.

``LMVAE_LIMITS=line=100000000,nesting=500`` in the environment raises (or lowers) the limits that it names. The limits stand
far above what honest files hold, and far below what a machine cannot bear.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from lmvae_fast.errors import ConfigError, DataError, LMVAEError

#: Environment variable with limits by name.
LIMITS = "LMVAE_LIMITS"

DEFAULTS = {
    "line": 16 << 20,  # bytes of a line of text
    "records": 200_000_000,  # records of a file
    "inflated": 16 << 30,  # bytes that a compressed file may inflate to
    "document": 1 << 30,  # bytes of a JSON document that is read as a whole
    "configuration": 4 << 20,  # bytes of a configuration file, a manifest, a record of a line
    "nesting": 100,  # lists and mappings within one another
    "nodes": 1_000_000,  # values of a YAML document with its aliases written out
    "digits": 300,  # of an integer: more make no number that a computer holds
}


def limit(name: str) -> int:
    """A limit by its name: the environment's, or the default. Raises ConfigError for a variable that cannot be read."""
    return _limits(os.environ.get(LIMITS) or "")[name]


@functools.lru_cache(maxsize=8)
def _limits(text: str) -> dict[str, int]:
    chosen = dict(DEFAULTS)
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        number = whole_number(value)
        if key not in DEFAULTS or number is None:
            raise ConfigError(
                f"{LIMITS} wants limits by name", value=part, limit=", ".join(DEFAULTS),
                remedy=f"for example {LIMITS}=line=100000000,nesting=500",
            )  # fmt: skip
        chosen[key] = number
    return chosen


def whole_number(text: str) -> int | None:
    """A number of at most 18 digits, 0 to 9; None for any other text. (Python reads digits of other scripts too.)"""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def refuse(
    name: str, problem: str, value: Any, *, error: type[LMVAEError] = DataError, unit: str = "bytes"
) -> LMVAEError:
    """The error for what is over the limit of a name; it says how to raise it. The caller raises it."""
    return error(
        problem, value=value, limit=f"{limit(name)} {unit}", remedy=f"if it is meant so, set {LIMITS}={name}=..."
    )
