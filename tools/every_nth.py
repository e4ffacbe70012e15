"""A pytest plugin that keeps every n-th test: `python -m pytest -p tools.every_nth --every N --first K --collected FILE`.

It is used by tools/test_matrix.py. FILE gets the number of tests there were before, written by whichever process collects.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("every n-th test")
    group.addoption("--every", type=int, default=1)
    group.addoption("--first", type=int, default=0)
    group.addoption("--collected", default="")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After -k and -m have chosen."""
    if config.getoption("--collected"):
        Path(config.getoption("--collected")).write_text(str(len(items)), encoding="ascii")
    kept = items[config.getoption("--first") :: config.getoption("--every")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
