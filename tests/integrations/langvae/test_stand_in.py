"""`install()`: `import langvae` where the real one is absent, and never in front of it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations import langvae as ours


@pytest.fixture(autouse=True)
def _absent():
    if importlib.util.find_spec("langvae") is not None:
        pytest.skip("the real LangVAE is installed here")
    yield
    ours.uninstall()


def test_every_name_is_answered():
    ours.install()
    ours.install()  # again
    assert importlib.import_module("langvae").LangVAE is ours.LangVAE
    for module, name in (
        ("langvae.arch.vae", "LangVAE"),
        ("langvae.encoders", "SentenceEncoder"),
        ("langvae.decoders.sentence", "SentenceDecoder"),
        ("langvae.data_conversion.tokenization", "TokenizedAnnotatedDataSet"),
        ("langvae.pipelines", "LanguageTrainingPipeline"),
        ("langvae.trainers", "CyclicalScheduleKLThresholdTrainerConfig"),
        ("langvae.trainers.training_callbacks", "TensorBoardCallback"),
    ):
        assert getattr(importlib.import_module(module), name) is getattr(ours, name)
    assert importlib.util.find_spec("langvae.encoders") is not None
    with pytest.raises(ImportError):
        importlib.import_module("langvae.nothing")
    ours.uninstall()
    assert importlib.util.find_spec("langvae") is None


def test_pythae_is_answered_only_where_it_is_absent():
    here = importlib.util.find_spec("pythae") is not None
    ours.install()
    config = importlib.import_module("pythae.models.vae").VAEConfig
    assert (config is ours.VAEConfig) == (not here)


def test_a_real_langvae_is_never_hidden(tmp_path):
    (tmp_path / "langvae").mkdir()
    (tmp_path / "langvae" / "__init__.py").write_text("REAL = True")
    code = (
        "from lmvae_fast.integrations.langvae import install\n"
        "try:\n    install()\nexcept ValueError as error:\n    print(type(error).__name__, error)\n"
        "import langvae; print(langvae.REAL)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines()[0].startswith("ConfigError a real LangVAE is installed"), run.stderr[-2000:]
    assert run.stdout.splitlines()[1] == "True"


def test_one_that_is_imported_is_not_replaced(monkeypatch):
    real = ModuleType("langvae")
    monkeypatch.setitem(sys.modules, "langvae", real)
    with pytest.raises(ConfigError, match="hide it"):
        ours.install()
    assert sys.modules["langvae"] is real
