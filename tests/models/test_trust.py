"""No model folder runs code: `auto_map` is an error that names the option, never a question on the terminal."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lmvae_fast
from lmvae_fast.testing import make_model

ANSWERS_YES = """
import sys
import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError
try:
    lf.LMVAE.from_pretrained(sys.argv[1])
except CheckpointError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_code_in_a_part_is_not_run(tmp_path, part):
    make_model("gpt2", latent_dim=4, max_len=8).save_pretrained(tmp_path / "model", include_frozen=True)
    place, mark = tmp_path / "model" / part, tmp_path / "it-ran"
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "of-their-own", "auto_map": dict.fromkeys(names, "theirs.Theirs")}
    (place / "config.json").write_text(json.dumps(config))
    (place / "theirs.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass Theirs: pass\n")
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS_YES, str(tmp_path / "model")], input="y\n" * 50, capture_output=True, text=True
    )
    assert not mark.exists(), "a model folder ran its code"
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("refused:") and "LMVAE_TRUST_REMOTE_CODE=1" in done.stdout
    assert "[y/N]" not in done.stdout + done.stderr


def test_every_part_is_loaded_without_trust():
    """What calls transformers' from_pretrained says trust_remote_code, in whatever file it is."""
    package, silent = Path(lmvae_fast.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr != "from_pretrained" or owner in ("LMVAE", "lf.LMVAE", "InvertibleCVAE", "cls"):
                continue
            if not any(word.arg in ("trust_remote_code", None) for word in node.keywords):  # None: **options
                silent.append(f"{path.relative_to(package)}:{node.lineno}")
    assert not silent
