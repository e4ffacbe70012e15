"""Configurations: frozen dataclasses with JSON and YAML in and out.

Unknown fields, values out of range and contradictions raise :class:`~lmvae_fast.errors.ConfigError` when the object is
made, so that a run never starts on a configuration it would not survive.
"""

from lmvae_fast.config.flow import FlowConfig, FlowTrainConfig
from lmvae_fast.config.generation import GenerationConfig
from lmvae_fast.config.model import DTYPES, KL_MODES, OBJECTIVES, LMVAEConfig
from lmvae_fast.config.plain_decoder import PlainDecoderConfig
from lmvae_fast.config.training import TrainConfig

__all__ = [
    "DTYPES",
    "KL_MODES",
    "OBJECTIVES",
    "FlowConfig",
    "FlowTrainConfig",
    "GenerationConfig",
    "LMVAEConfig",
    "PlainDecoderConfig",
    "TrainConfig",
]
