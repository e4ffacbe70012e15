"""Which versions of other packages their integrations were tested with; others are used with one warning."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

_warned: set[str] = set()


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 6.2.0rc1 -> (6, 2)."""
    found = []
    for part in text.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def warn_outside(package: str, low: str, high: str) -> None:
    """Warn once for each package whose installed version is not in [low, high); nothing where it is not installed."""
    if package in _warned:
        return
    try:
        found = version(package)
    except PackageNotFoundError:
        return
    if not numbers(low) <= numbers(found) < numbers(high):
        _warned.add(package)
        warnings.warn(
            f"{package} {found} is outside the versions that this integration was tested with (>= {low}, < {high}); "
            "its results may differ",
            stacklevel=3,
        )
