"""LangVAE 0.6.13: its classes by their own names on the engine, its checkpoints read and written, its figures reproduced."""

from lmvae_fast.integrations.langvae.containers import (
    DatasetOutput,
    ModelOutput,
    TensorBoardCallback,
    TrainingCallback,
    VAEConfig,
)
from lmvae_fast.integrations.langvae.model import load_checkpoint, load_reference, save_checkpoint
from lmvae_fast.integrations.langvae.parts import SentenceDecoder, SentenceEncoder
from lmvae_fast.integrations.langvae.pipeline import LanguageTrainingPipeline
from lmvae_fast.integrations.langvae.stand_in import install, uninstall
from lmvae_fast.integrations.langvae.tokenization import (
    TokenizedAnnotatedDataSet,
    TokenizedDataSet,
    collate_sparse_fn,
)
from lmvae_fast.integrations.langvae.trainer_config import CyclicalScheduleKLThresholdTrainerConfig
from lmvae_fast.integrations.langvae.vae import LangVAE

__all__ = [
    "CyclicalScheduleKLThresholdTrainerConfig",
    "DatasetOutput",
    "LangVAE",
    "LanguageTrainingPipeline",
    "ModelOutput",
    "SentenceDecoder",
    "SentenceEncoder",
    "TensorBoardCallback",
    "TokenizedAnnotatedDataSet",
    "TokenizedDataSet",
    "TrainingCallback",
    "VAEConfig",
    "collate_sparse_fn",
    "install",
    "load_checkpoint",
    "load_reference",
    "save_checkpoint",
    "uninstall",
]
