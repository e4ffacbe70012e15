"""Whole systems in plain eager torch: what every fast path is checked against and timed against.

Nothing here is fast or clever. Each file runs the Hugging Face model's own forward, one token at a time where the
published system does so, with a key/value cache that we fill by hand.
"""

from lmvae_fast.reference import cvae, langvae, optimus, stepwise
from lmvae_fast.reference.cvae import CVAELoss, ReferenceCVAE
from lmvae_fast.reference.langvae import LangVAELoss, ReferenceLangVAE
from lmvae_fast.reference.optimus import OptimusLoss, ReferenceOptimus
from lmvae_fast.reference.stepwise import StepwiseDecoder, stepwise_greedy, stepwise_logits

__all__ = [
    "CVAELoss",
    "LangVAELoss",
    "OptimusLoss",
    "ReferenceCVAE",
    "ReferenceLangVAE",
    "ReferenceOptimus",
    "StepwiseDecoder",
    "cvae",
    "langvae",
    "optimus",
    "stepwise",
    "stepwise_greedy",
    "stepwise_logits",
]
