"""The errors this package raises on bad input: each names the value, the limit it broke and the remedy."""

from __future__ import annotations

from typing import Any


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
        parts = [problem]
        if value is not None:
            parts.append(f"got: {value}")
        if limit is not None:
            parts.append(f"allowed: {limit}")
        if remedy is not None:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))


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
    """A loss or gradient became NaN or infinite."""


class DistributedError(LMVAEError, RuntimeError):
    """The processes of one run have lost one another."""


class MissingPackageError(LMVAEError, ImportError):
    """A package that this feature needs is not installed; ``name`` is the module."""

    def __init__(self, problem: str, *, name: str, remedy: str):
        super().__init__(problem, remedy=remedy)
        self.name = name


class MemoryLimitError(LMVAEError, MemoryError):
    """The machine or the GPU has not enough memory for what was asked."""
