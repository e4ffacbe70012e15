"""Benchmarks stand without the tests: no file of them imports one, and the worker stands without anything."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Run by LangVAE's interpreter, or imported there: nothing of this package may be needed.
BY_LANGVAE = {
    "training/langvae_side.py", "training/langvae_learning.py", "generation/langvae_side.py",
    "integrations/langvae_side.py", "integrations/pythae_side.py",
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it, ``importlib.import_module("...")`` included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "import_module":
                found.add(str(node.args[0].value))
    return found


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_no_benchmark_imports_a_test():
    files = sorted(BENCHMARKS.rglob("*.py"))
    assert len(files) > 20
    assert [str(file.relative_to(BENCHMARKS)) for file in files if "tests" in tops(file)] == []


def test_an_import_of_tests_is_seen(tmp_path):
    for text in ("def f():\n    from tests.x import y\n", "import tests\n", "importlib.import_module('tests.a')\n"):
        (tmp_path / "bench.py").write_text(text)
        assert "tests" in tops(tmp_path / "bench.py")


def test_the_worker_needs_the_standard_library_only():
    assert tops(BENCHMARKS / "common" / "worker.py") <= {*sys.stdlib_module_names, "__future__"}


@pytest.mark.parametrize("name", sorted(BY_LANGVAE))
def test_what_langvae_runs_imports_nothing_of_ours(name):
    assert not {"lmvae_fast", "benchmarks", "tests"} & tops(BENCHMARKS / name)
    assert "worker" in tops(BENCHMARKS / name)


def test_what_langvae_runs_is_known():
    sides = {str(file.relative_to(BENCHMARKS)) for file in BENCHMARKS.rglob("*.py") if "langvae" in tops(file)}
    assert sides == BY_LANGVAE
