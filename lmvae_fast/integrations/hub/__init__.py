"""Hugging Face: our models through `AutoModel`, `pipeline`, `datasets.map` and `Trainer`.

Importing this module registers them: ``AutoConfig`` and ``AutoModel`` then read folders and hub names of ours, and
``pipeline("text2latent")`` and ``pipeline("latent2text")`` exist.
"""

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from lmvae_fast.integrations.hub.columns import BetaSchedule, Collator, encode_columns, tokenize_columns
from lmvae_fast.integrations.hub.model import MODEL_TYPE, PretrainedLMVAE, PretrainedLMVAEConfig
from lmvae_fast.integrations.hub.pipelines import Latent2Text, Text2Latent
from lmvae_fast.integrations.versions import warn_outside

warn_outside("transformers", "5.10", "6")

AutoConfig.register(MODEL_TYPE, PretrainedLMVAEConfig, exist_ok=True)
AutoModel.register(PretrainedLMVAEConfig, PretrainedLMVAE, exist_ok=True)
for _task, _kind in (("text2latent", Text2Latent), ("latent2text", Latent2Text)):
    if _task not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(_task, _kind, pt_model=AutoModel)

__all__ = [
    "BetaSchedule",
    "Collator",
    "Latent2Text",
    "PretrainedLMVAE",
    "PretrainedLMVAEConfig",
    "Text2Latent",
    "encode_columns",
    "tokenize_columns",
]
