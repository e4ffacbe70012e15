"""`install()`: scripts that say ``import langvae`` run on this package, where the real one is absent."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.langvae import containers, parts, pipeline, tokenization, trainer_config, vae

_DATA = {
    "TokenizedDataSet": tokenization.TokenizedDataSet,
    "TokenizedAnnotatedDataSet": tokenization.TokenizedAnnotatedDataSet,
    "collate_sparse_fn": tokenization.collate_sparse_fn,
}
_CONFIG = {"CyclicalScheduleKLThresholdTrainerConfig": trainer_config.CyclicalScheduleKLThresholdTrainerConfig}
_PIPELINE = {"LanguageTrainingPipeline": pipeline.LanguageTrainingPipeline}

# Module -> its names.
LANGVAE: dict[str, dict[str, Any]] = {
    "langvae": {"LangVAE": vae.LangVAE},
    "langvae.arch": {},
    "langvae.arch.vae": {"LangVAE": vae.LangVAE},
    "langvae.encoders": {"SentenceEncoder": parts.SentenceEncoder},
    "langvae.encoders.sentence": {"SentenceEncoder": parts.SentenceEncoder},
    "langvae.decoders": {"SentenceDecoder": parts.SentenceDecoder},
    "langvae.decoders.sentence": {"SentenceDecoder": parts.SentenceDecoder},
    "langvae.data_conversion": {},
    "langvae.data_conversion.tokenization": _DATA,
    "langvae.pipelines": _PIPELINE,
    "langvae.pipelines.lang_training": _PIPELINE,
    "langvae.trainers": _CONFIG,
    "langvae.trainers.cyclical_schedule_kl": _CONFIG,
    "langvae.trainers.training_callbacks": {"TensorBoardCallback": containers.TensorBoardCallback},
}
# What LangVAE's scripts take from pythae.
PYTHAE: dict[str, dict[str, Any]] = {
    "pythae": {},
    "pythae.models": {"VAEConfig": containers.VAEConfig},
    "pythae.models.vae": {"VAEConfig": containers.VAEConfig},
    "pythae.models.base": {},
    "pythae.models.base.base_utils": {"ModelOutput": containers.ModelOutput},
    "pythae.data": {},
    "pythae.data.datasets": {"DatasetOutput": containers.DatasetOutput},
    "pythae.trainers": {},
    "pythae.trainers.training_callbacks": {"TrainingCallback": containers.TrainingCallback},
}
_MARK = "__lmvae_fast__"


def install() -> None:
    """Let ``import langvae`` give this package's classes; also what its scripts take from pythae, where that is absent.

    May be called again. Other names of either package are ImportErrors.

    Raises ConfigError where a real LangVAE is installed or imported: it is never hidden.
    """
    if _real("langvae"):
        raise ConfigError(
            "a real LangVAE is installed, and install() would hide it",
            value=getattr(importlib.import_module("langvae"), "__file__", "a module that was put into sys.modules"),
            remedy="pip uninstall langvae, or import lmvae_fast.integrations.langvae by its own name",
        )
    _put(LANGVAE)
    if not _real("pythae"):
        _put(PYTHAE)


def uninstall() -> None:
    """Take back what :func:`install` put there; what scripts have imported already stays theirs."""
    for name in (*LANGVAE, *PYTHAE):
        if getattr(sys.modules.get(name), _MARK, False):
            del sys.modules[name]


def _real(package: str) -> bool:
    """Whether a package is there that was not put there by us."""
    loaded = sys.modules.get(package)
    if loaded is not None:
        return not getattr(loaded, _MARK, False)
    return importlib.util.find_spec(package) is not None


def _put(modules: dict[str, dict[str, Any]]) -> None:
    for name, names in modules.items():
        module = ModuleType(name, f"Names of {name.partition('.')[0]}, answered by lmvae_fast.integrations.langvae.")
        package = any(other.startswith(f"{name}.") for other in modules)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
        if package:
            module.__path__ = []
        setattr(module, _MARK, True)
        vars(module).update(names)
        sys.modules[name] = module
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
