"""What ``import lmvae_fast`` reaches without another import, each in a fresh interpreter; packages that may be absent."""

from __future__ import annotations

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lmvae_fast as lf
from lmvae_fast import optional
from lmvae_fast.errors import LMVAEError, MissingPackageError

# An expression, and what must be true of it, in one interpreter that has imported nothing but the package.
REACHED = """
import sys, types
import lmvae_fast as lf
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert callable(lf.kernels.posterior.posterior_sample)
assert callable(lf.kernels.backend.report) and "transformers" not in sys.modules
assert callable(lf.integrations.langvae.load_checkpoint)
assert callable(lf.integrations.freia.convert)
assert callable(lf.integrations.ray.decode)
assert lf.reference.ReferenceLangVAE and callable(lf.reference.langvae.ReferenceLangVAE)
assert callable(lf.testing.make_model)
assert isinstance(lf.profiling, types.ModuleType) and isinstance(lf.models, types.ModuleType)
for name in lf.__all__:
    getattr(lf, name)
for package in (lf, lf.integrations, lf.kernels):
    for name in ("no_such_thing", "__wrapped__"):
        assert not hasattr(package, name), (package, name)
print("reached")
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_public_modules_are_attributes():
    run = python(REACHED)
    assert run.stdout.strip() == "reached", run.stderr[-3000:]


def test_every_folder_of_the_package_is_one():
    names = {module.name for module in pkgutil.iter_modules(lf.__path__) if module.ispkg}
    assert {"integrations", "reference", "testing"} <= names
    for name in names:
        assert getattr(lf, name).__name__ == f"lmvae_fast.{name}"
    assert {"langvae", "freia", "ray"} <= set(dir(lf.integrations))


def test_a_module_that_cannot_be_imported_says_so_itself(tmp_path):
    """Its own error, not an AttributeError that hides it."""
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "__init__.py").write_text(
        "from lmvae_fast import lazy\ndef __getattr__(name):\n    return lazy.submodule(__name__, name)\n"
    )
    (tmp_path / "box" / "broken.py").write_text("import not_there_at_all\n")
    run = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import box; box.broken")
    assert "ModuleNotFoundError: No module named 'not_there_at_all'" in run.stderr


def test_a_missing_package_is_named_with_what_installs_it():
    with pytest.raises(MissingPackageError) as found:
        optional.require("not_there_at_all.part", purpose="drawing", extra="demo")
    error = found.value
    assert isinstance(error, (LMVAEError, ImportError)) and error.name == "not_there_at_all.part"
    assert "drawing needs not_there_at_all.part" in str(error) and "pip install 'lmvae_fast[demo]'" in str(error)
    with pytest.raises(MissingPackageError, match="pip install that-package"):
        optional.require("not_there_at_all", purpose="x", package="that-package")
    assert optional.require("json", purpose="x") is sys.modules["json"]


DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "joblib": "scikit-learn",
    "ot": "pot",
    "umap": "umap-learn",
    "bert_score": "bert-score",
    "rouge_score": "rouge-score",
    "sentence_transformers": "sentence-transformers",
}


def asked_for(file: Path) -> list[tuple[str, str]]:
    """(module, extra) of each ``require``; that of probes takes the extra third, and means its own where none is given."""
    ours = "lmvae_fast.probes.optional" in (text := file.read_text()) or ".optional import require" in text
    asked = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", getattr(node.func, "attr", "")) != "require":
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        extra = given.get("extra", node.args[2] if len(node.args) > 2 else None)
        if extra is None and ours and "package" not in given and "purpose" not in given:
            extra = ast.Constant("probes")
        if isinstance(extra, ast.Constant) and node.args and isinstance(node.args[0], ast.Constant):
            asked.append((node.args[0].value, extra.value))
    return asked


def test_extras_that_are_asked_for_exist():
    """Every ``require`` of the package names an extra of pyproject.toml that holds that package, or one always installed."""
    root = Path(lf.__file__).parent
    project, _, rest = (root.parent / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
    always, lines = project.split("dependencies = [")[1].lower(), rest.split("\n[")[0].splitlines()
    asked = [pair for file in root.rglob("*.py") for pair in asked_for(file)]
    assert {("matplotlib", "demo"), ("ray.data", "ray"), ("umap", "umap"), ("ot", "probes")} <= set(asked)
    for module, extra in asked:
        (line,) = [line for line in lines if line.startswith(f"{extra} =")]
        top = module.partition(".")[0].lower()
        wanted = DISTRIBUTIONS.get(top, top)
        assert f'"{wanted}' in line.lower() or f'"{wanted}' in always, (module, extra)
