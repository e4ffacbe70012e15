"""The house rules that hold for every op at once: where its files are, what imports what, 64-bit addresses."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from .common import assert_int64_addresses

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
WITH_TRITON = [op for op in OPS if (ROOT / "kernels" / op / "triton.py").exists()]
DEVICE_CODE = sorted(
    p for op in WITH_TRITON for p in (ROOT / "kernels" / op).glob("*.py") if "@triton.jit" in p.read_text()
)


def imports(path: Path) -> set[str]:
    """Every module a file imports, relative ones resolved to lmvae_fast.kernels...."""
    package = ["lmvae_fast", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, node.module or ""]).strip("."))
    return found


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_where_its_name_says(op):
    parts = [f"kernels/{op}/{name}.py" for name in ("__init__", "op", "checks", "reference")]
    for path in (*parts, f"tests/kernels/test_{op}.py"):
        assert (ROOT / path).exists(), f"{path} is missing"


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_checked_in_checks_alone(op):
    """op.py calls what checks.py has; a private check of its own would be a second place to look."""
    tree = ast.parse((ROOT / "kernels" / op / "op.py").read_text())
    own = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.lstrip("_").startswith("check")]
    assert not own, f"{own} belong in kernels/{op}/checks.py"
    assert any(module.endswith(f"kernels.{op}.checks") for module in imports(ROOT / "kernels" / op / "op.py"))


def test_files_hold_one_thing():
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(long) > 50
    assert not {path: lines for path, lines in long.items() if lines > 400}, "look for the second thing in them"


def test_one_file_knows_how_wide_vectors_are():
    """csrc/cpu/vector.h asks which instruction set is compiled; the others take widths and registers from it."""
    asks = [
        path.name
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".h", ".cpp") and ("__AVX2__" in path.read_text() or "vector_size" in path.read_text())
    ]
    assert asks == ["vector.h"]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_model(path):
    wrong = {m for m in imports(path) if m.startswith("lmvae_fast") and not m.startswith("lmvae_fast.kernels")}
    assert not wrong
    if path.name == "reference.py":
        assert not any("triton" in m for m in imports(path)), "a reference is plain torch"


def test_the_folder_imported_under_its_bare_name_does_nothing():
    """transformers probes for a PyPI package called kernels: ours, found from the repository root, must be inert."""
    code = "import sys; before = set(sys.modules); import kernels; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kernels']"


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_triton_addresses_are_64_bit(path):
    assert_int64_addresses(path)


@pytest.mark.parametrize("op", WITH_TRITON)
def test_triton_kernels_are_in_the_compile_gate(op):
    pytest.importorskip("triton")
    module = importlib.import_module(f"lmvae_fast.kernels.{op}.triton")
    gated = {case.kernel.fn.__name__ for case in module.COMPILE_CASES}
    kernels = {
        node.name
        for path in DEVICE_CODE
        if path.parent.name == op
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
    }
    assert kernels <= gated, f"not in COMPILE_CASES: {sorted(kernels - gated)}"


def test_the_address_check_can_fail():
    source = "import triton\n@triton.jit\ndef k(x, stride):\n    i = tl.program_id(0)\n    y = x + i * stride\n"
    kernel = ast.parse(source).body[1]
    from .common import _narrow_addresses

    assert len(_narrow_addresses(kernel)) == 2
