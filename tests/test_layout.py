"""The house: which room imports which, no circles, no upward arrows, and files that hold one thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmvae_fast"

# A room may import from rooms of its own level and below. Within a level, circles are found by the other test.
LEVELS = [
    {"errors", "lazy", "optional", "signals", "limits", "memory", "temporaries"},
    {"documents"},
    {"files", "tensor_files", "model_folders"},
    {"config", "kernels", "pretrained", "caches"},
    {"text", "data", "reference"},
    {"models"},
    {"training", "generation", "evaluation"},
    {"exploration", "probes", "reports", "profiling", "integrations", "testing", "verification"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# The upward arrows: `model.decode` and `InvertibleCVAE.fit` are two-line doors to what is built on the model.
EXCEPTIONS = {
    ("lmvae_fast.models.lmvae", "lmvae_fast.generation.engine"),
    ("lmvae_fast.models.systems.invertible_cvae", "lmvae_fast.training.flow_loop"),
}

# Data tables may be longer than what a person reads at one sitting.
LONGEST, DATA_TABLES = 400, {"lmvae_fast/data/lexicon.py"}


def module_name(path: Path) -> str:
    """Dotted name; kernels/ is installed as lmvae_fast.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lmvae_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for top in (PACKAGE, ROOT / "kernels") for path in sorted(top.rglob("*.py"))}
SOURCES = {name for name, path in FILES.items() if path.name != "__init__.py"}


def imports(name: str) -> set[str]:
    """Modules of the package that a file imports, anywhere in it and for types too; names are looked up behind packages."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("lmvae_fast"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).strip(".")
            if base.startswith("lmvae_fast"):
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    found.add(submodule if submodule in FILES else base)
    return {module for module in found if module in FILES}


def behind(module: str) -> set[str]:
    """The files behind a name: those that a package's __init__ takes its names from, or the file itself."""
    if module in SOURCES or module == "lmvae_fast":  # the top takes its names when they are asked for
        return {module} & SOURCES
    return {source for target in imports(module) for source in behind(target)}


GRAPH = {name: {source for target in imports(name) for source in behind(target)} for name in SOURCES}


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_file_is_in_a_room_that_has_a_level():
    assert {room(name) for name in SOURCES} <= LEVEL.keys()


def test_imports_run_one_way():
    upward = {
        (name, target)
        for name in SOURCES
        for target in GRAPH[name]
        if room(target) is not None and LEVEL[room(target)] > LEVEL[room(name)]
    }
    assert upward <= EXCEPTIONS, f"upward: {sorted(upward - EXCEPTIONS)}"
    assert upward == EXCEPTIONS, "an exception that is not needed any more"


def test_reference_imports_only_references_of_ops():
    for name in SOURCES:
        if room(name) == "reference":
            kernels = {target for target in GRAPH[name] if room(target) == "kernels"}
            assert all(target.endswith((".reference", ".visibility")) for target in kernels), name


def test_no_file_imports_another_in_a_circle():
    assert circles({name: GRAPH[name] - {b for a, b in EXCEPTIONS if a == name} for name in SOURCES}) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import one another in a circle (strongly connected components of more than one file)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph.get(name, ()):
            if target not in graph:
                continue
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("top", ["lmvae_fast", "kernels", "csrc", "tests", "benchmarks", "tools", "examples"])
def test_no_file_is_longer_than_one_sitting(top):
    long = {}
    for path in (ROOT / top).rglob("*"):
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            lines = len(path.read_text().splitlines())
            relative = str(path.relative_to(ROOT))
            if lines > LONGEST and relative not in DATA_TABLES:
                long[relative] = lines
    assert not long, "look for the second thing in each"
