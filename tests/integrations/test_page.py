"""The snippets of docs/integrations.md run as they stand, with tiny parts under the names that they use."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import lmvae_fast as lf
from lmvae_fast.testing import SENTENCES, make_model
from tests.integrations.langvae.parts_on_disk import write_parts

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text()
SNIPPETS = {
    re.search(r"## ([\w -]+)\n(?!.*## )", PAGE[: found.start()], re.S)[1].splitlines()[0]: found[1]
    for found in re.finditer(r"```python\n(.*?)```", PAGE, re.S)
}


def test_every_framework_has_a_snippet():
    assert list(SNIPPETS) == ["LangVAE", "FrEIA", "Hugging Face", "sentence-transformers", "pythae"]


@pytest.mark.parametrize("name", ["LangVAE", "FrEIA", "sentence-transformers", "pythae"])
def test_a_snippet_runs(name, tmp_path, monkeypatch):
    for module in {"sentence-transformers": ["sentence_transformers"], "pythae": ["pythae"]}.get(name, []):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path)
    text = SNIPPETS[name]
    for wanted, here in (
        ('"gpt2", latent_size=128, max_len=32', '"./gpt2", latent_size=128, max_len=8'),
        ('"bert-base-cased"', '"./bert"'), ("num_epochs=20", "num_epochs=1"), ("n_components=10", "n_components=2"),
        ("sample(100)", "sample(5)"),
    ):  # fmt: skip
        text = text.replace(wanted, here)
    model = make_model()
    if name == "sentence-transformers":
        model.save_pretrained(tmp_path / "runs" / "first" / "model")
    names = {"sentences": list(SENTENCES), "model": model, "texts": list(SENTENCES), "lf": lf}
    exec(compile(text, "docs/integrations.md", "exec"), names)


def test_modules_that_the_page_names_are_there():
    for name in set(re.findall(r"`(lmvae_fast\.integrations\.\w+)`", PAGE)):
        if name.rpartition(".")[2] in ("pythae", "ray"):
            pytest.importorskip(name.rpartition(".")[2])
        importlib.import_module(name)
