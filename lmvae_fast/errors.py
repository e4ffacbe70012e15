"""The errors this package raises on bad input: each names the value, the limit it broke and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Characters of a value that a message shows; and of anything else in it.
VALUE_SHOWN, TEXT_SHOWN = 400, 2000


class LMVAEError(Exception):
    """Base of every error raised by ``lmvae_fast`` on purpose.

    Args:
        problem: what is wrong, in one clause.
        value: the offending value, if there is one.
        limit: what would have been accepted.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, *, value: Any = None, limit: Any = None, remedy: str | None = None):
        self.problem, self.value, self.limit, self.remedy = problem, value, limit, remedy
        names = {"value": "got: ", "limit": "allowed: ", "remedy": "remedy: "}
        super().__init__("; ".join(names.get(name, "") + text for name, text in self.fields().items()))

    def fields(self) -> dict[str, str]:
        """Problem, value, limit and remedy as texts, those that there are; what is too long to be read is shortened."""
        found = {"problem": shown(self.problem, TEXT_SHOWN)}
        if self.value is not None:
            found["value"] = shown(self.value, VALUE_SHOWN)
        for name in ("limit", "remedy"):
            if (given := getattr(self, name)) is not None:
                found[name] = shown(given, TEXT_SHOWN)
        return found


def shown(value: Any, most: int = VALUE_SHOWN) -> str:
    """A value as a message shows it: at most so many characters, however large it is."""
    if not isinstance(value, str):
        value = _text(value, most)
    return value if len(value) <= most else f"{value[: most - 30]}... ({len(value):,} characters)"


def _text(value: Any, most: int) -> str:
    """``str(value)``, or its kind and size where that would have to be written out to be cut."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * most:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        left = 50 * most
        for item in _leaves(value):
            left -= 1 + (len(item) if isinstance(item, (str, bytes)) else 0)
            if left < 0:
                return f"a {type(value).__name__} of {len(value):,} entries"
    try:
        return str(value)
    except Exception:  # a message must not fail for what it is about
        return f"a {type(value).__name__}"


def _leaves(value: Any) -> Iterator[Any]:
    """What containers hold, containers within them opened; as long as somebody asks."""
    stack = [iter((value,))]
    while stack:
        item = next(stack[-1], stack)
        if item is stack:
            stack.pop()
        elif isinstance(item, Mapping):
            stack.append(iter([part for pair in item.items() for part in pair]))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.append(iter(item))
        else:
            yield item
            continue
        yield None


class ConfigError(LMVAEError, ValueError):
    """A configuration has an unknown, malformed or contradictory field."""


class DataError(LMVAEError, ValueError):
    """A dataset, a file of sentences or a token id cannot be used."""


class LatentError(LMVAEError, ValueError):
    """A latent has the wrong width, rank or dtype, or is not finite."""


class UnsupportedDecoderError(LMVAEError, ValueError):
    """A decoder (or one of its layers) has no keys and values that we can honour exactly."""


class TokenizerError(LMVAEError, ValueError):
    """A tokenizer lacks a special token that generation or training needs."""


class CheckpointError(LMVAEError, RuntimeError):
    """A checkpoint or model folder is missing, truncated, corrupt or of another kind."""


class OutputError(LMVAEError, OSError):
    """An output folder or file cannot be written."""


class NumericalError(LMVAEError, ArithmeticError):
    """A loss or gradient became NaN or infinite; in training with its ``step``, the ``rows`` of the data and the last good
    ``checkpoint``, where they are known."""

    step: int | None = None
    rows: list[int] | None = None
    checkpoint: Any = None


class DistributedError(LMVAEError, RuntimeError):
    """The processes of one run have lost one another."""


class MissingPackageError(LMVAEError, ImportError):
    """A package that this feature needs is not installed; ``name`` is the module."""

    def __init__(self, problem: str, *, name: str, remedy: str):
        super().__init__(problem, remedy=remedy)
        self.name = name


class MemoryLimitError(LMVAEError, MemoryError):
    """The machine or the GPU has not enough memory for what was asked."""
