"""docs/environment.md lists every variable that the source reads, and none that it does not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ("lmvae_fast", "kernels", "tests", "tools", "benchmarks", "examples")
READERS = {"get", "setdefault", "pop", "getenv"}


def read_by_python(text: str) -> set[str]:
    """Variables that a file reads: ``environ.get("X")`` and the like, ``environ["X"]``, ``getenv("X")``, ``envvar="X"``."""
    found: set[str] = set()
    tree = ast.parse(text)
    constants = {  # X = "NAME" at the top of a file
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            owner = ast.unparse(node.func)
            name, first = owner.rpartition(".")[2], node.args[0] if node.args else None
            if name in READERS and ("environ" in owner or name == "getenv"):
                if isinstance(first, ast.Constant):
                    found.add(first.value)
                elif isinstance(first, ast.Name):
                    found.add(constants.get(first.id))
            found |= {k.value.value for k in node.keywords if k.arg == "envvar" and isinstance(k.value, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            value = node.slice.value if isinstance(node.slice, ast.Constant) else None
            found |= {value} if "environ" in ast.unparse(node.value) else set()
    return {
        name for name in found if isinstance(name, str) and name.isupper()
    }  # not a key of a dict called environment


def read_by_make(text: str) -> set[str]:
    """Variables of a Makefile that may be given: those with a default (``?=``), and those it only uses."""
    defaults = set(re.findall(r"^(\w+)\s*\?=", text, re.M))
    own = set(re.findall(r"^(\w+)\s*:?=", text, re.M)) | {"MAKEFILE_LIST"}
    return defaults | (set(re.findall(r"\$\((\w+)\)", text)) - own)


def read_by_source() -> set[str]:
    found = read_by_python((ROOT / "setup.py").read_text()) | read_by_make((ROOT / "Makefile").read_text())
    for folder in PYTHON:
        for file in (ROOT / folder).rglob("*.py"):
            found |= read_by_python(file.read_text())
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".cpp", ".h", ".cu"):
            found |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text()))
    return found


def listed(text: str) -> set[str]:
    """Names in the first column of the tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_list_is_what_the_source_reads():
    ours, _, others = (ROOT / "docs" / "environment.md").read_text().partition("## Read by libraries")
    assert listed(ours) == read_by_source()
    assert others and not listed(others) & listed(ours)


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ.get('A')", "from os import environ\nx = environ['A']", "import os\nos.getenv('A', '1')",
        "os.environ.setdefault('A', '1')", "B = 'A'\nos.environ.get(B)",
        "context.environment.get('A', '')", "typer.Option(envvar='A')",
    ],
)  # fmt: skip
def test_a_read_is_seen(text):
    assert read_by_python(text) == {"A"}


def test_what_is_only_set_or_another_thing_is_not():
    assert read_by_python("os.environ['A'] = '1'\nrow.get('B')\n{**os.environ, 'C': '1'}") == set()


def test_makefile_variables():
    assert read_by_make("A ?= 1\nB := 2\nall:\n\trun $(A) $(B) $(C)\n") == {"A", "C"}
