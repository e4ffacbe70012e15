"""lmvae_fast: a custom-kernel performance engine for language-model VAEs.

Everything public is here; names and modules are imported when first used, so that ``import lmvae_fast`` and the kernels
cost no transformers import. Beside the names below, every module is an attribute: ``lf.kernels.posterior``,
``lf.reference``, ``lf.testing``, ``lf.integrations.langvae``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmvae_fast import lazy

__version__ = "0.1.0"

# Public name -> module it lives in.
_PUBLIC = {
    "LMVAE": "lmvae_fast.models.lmvae",
    "LMVAEOutput": "lmvae_fast.models.lmvae",
    "LMVAEConfig": "lmvae_fast.config",
    "PlainDecoder": "lmvae_fast.models.plain_decoder",
    "PlainDecoderConfig": "lmvae_fast.config",
    "TrainConfig": "lmvae_fast.config",
    "GenerationConfig": "lmvae_fast.config",
    "FlowConfig": "lmvae_fast.config",
    "FlowTrainConfig": "lmvae_fast.config",
    "Batch": "lmvae_fast.text.batch",
    "Encoder": "lmvae_fast.models.encoder",
    "Decoder": "lmvae_fast.models.decoder.decoder",
    "Posterior": "lmvae_fast.models.posterior",
    "Injection": "lmvae_fast.models.injection",
    "CouplingFlow": "lmvae_fast.models.flow",
    "InvertibleCVAE": "lmvae_fast.models.systems.invertible_cvae",
    "FlowResult": "lmvae_fast.training.records",
    "train": "lmvae_fast.training.loop",
    "TrainResult": "lmvae_fast.training.records",
    "Callback": "lmvae_fast.training.callbacks",
    "generate": "lmvae_fast.generation.engine",
    "Generated": "lmvae_fast.generation.engine",
    "score": "lmvae_fast.generation.scoring",
    "interpolate": "lmvae_fast.exploration.operations",
    "traverse": "lmvae_fast.exploration.operations",
    "arithmetic": "lmvae_fast.exploration.operations",
    "neighbourhood": "lmvae_fast.exploration.operations",
    "average": "lmvae_fast.exploration.operations",
    "aggregate_quantiles": "lmvae_fast.exploration.points",
    "evaluate": "lmvae_fast.evaluation.evaluate",
    "probe": "lmvae_fast.probes.run",
    "read": "lmvae_fast.data",
    "generate_corpus": "lmvae_fast.data",
    "read_definitions": "lmvae_fast.data",
    "read_word_vectors": "lmvae_fast.data",
    "Definition": "lmvae_fast.data",
    "DefinitionDataset": "lmvae_fast.data",
    "WordVectors": "lmvae_fast.data",
    "SentenceDataset": "lmvae_fast.data",
    "Example": "lmvae_fast.data",
    "PromptResponse": "lmvae_fast.data",
    "PromptDataset": "lmvae_fast.data",
    "read_prompts": "lmvae_fast.data",
    "backend": "lmvae_fast.kernels.backend",
    "LMVAEError": "lmvae_fast.errors",
    "ConfigError": "lmvae_fast.errors",
    "DataError": "lmvae_fast.errors",
    "LatentError": "lmvae_fast.errors",
    "MemoryLimitError": "lmvae_fast.errors",
    "MissingPackageError": "lmvae_fast.errors",
    "UnsupportedDecoderError": "lmvae_fast.errors",
    "TokenizerError": "lmvae_fast.errors",
    "CheckpointError": "lmvae_fast.errors",
    "OutputError": "lmvae_fast.errors",
    "NumericalError": "lmvae_fast.errors",
}

__all__ = [
    "LMVAE",
    "Batch",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "CouplingFlow",
    "DataError",
    "Decoder",
    "Definition",
    "DefinitionDataset",
    "Encoder",
    "Example",
    "FlowConfig",
    "FlowResult",
    "FlowTrainConfig",
    "Generated",
    "GenerationConfig",
    "Injection",
    "InvertibleCVAE",
    "LMVAEConfig",
    "LMVAEError",
    "LMVAEOutput",
    "LatentError",
    "MemoryLimitError",
    "MissingPackageError",
    "NumericalError",
    "OutputError",
    "PlainDecoder",
    "PlainDecoderConfig",
    "Posterior",
    "PromptDataset",
    "PromptResponse",
    "SentenceDataset",
    "TokenizerError",
    "TrainConfig",
    "TrainResult",
    "UnsupportedDecoderError",
    "WordVectors",
    "__version__",
    "aggregate_quantiles",
    "arithmetic",
    "average",
    "backend",
    "evaluate",
    "generate",
    "generate_corpus",
    "integrations",
    "interpolate",
    "kernels",
    "neighbourhood",
    "probe",
    "read",
    "read_definitions",
    "read_prompts",
    "read_word_vectors",
    "reference",
    "score",
    "testing",
    "train",
    "traverse",
]

if TYPE_CHECKING:
    from lmvae_fast import integrations, kernels, reference, testing
    from lmvae_fast.config import (
        FlowConfig,
        FlowTrainConfig,
        GenerationConfig,
        LMVAEConfig,
        PlainDecoderConfig,
        TrainConfig,
    )
    from lmvae_fast.data import (
        Definition,
        DefinitionDataset,
        Example,
        PromptDataset,
        PromptResponse,
        SentenceDataset,
        WordVectors,
        generate_corpus,
        read,
        read_definitions,
        read_prompts,
        read_word_vectors,
    )
    from lmvae_fast.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LatentError,
        LMVAEError,
        MemoryLimitError,
        MissingPackageError,
        NumericalError,
        OutputError,
        TokenizerError,
        UnsupportedDecoderError,
    )
    from lmvae_fast.evaluation.evaluate import evaluate
    from lmvae_fast.exploration.operations import arithmetic, average, interpolate, neighbourhood, traverse
    from lmvae_fast.exploration.points import aggregate_quantiles
    from lmvae_fast.generation.engine import Generated, generate
    from lmvae_fast.generation.scoring import score
    from lmvae_fast.kernels.backend import backend
    from lmvae_fast.models.decoder.decoder import Decoder
    from lmvae_fast.models.encoder import Encoder
    from lmvae_fast.models.flow import CouplingFlow
    from lmvae_fast.models.injection import Injection
    from lmvae_fast.models.lmvae import LMVAE, LMVAEOutput
    from lmvae_fast.models.plain_decoder import PlainDecoder
    from lmvae_fast.models.posterior import Posterior
    from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
    from lmvae_fast.probes.run import probe
    from lmvae_fast.text.batch import Batch
    from lmvae_fast.training.callbacks import Callback
    from lmvae_fast.training.loop import train
    from lmvae_fast.training.records import FlowResult, TrainResult


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        return lazy.submodule(__name__, name)
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
