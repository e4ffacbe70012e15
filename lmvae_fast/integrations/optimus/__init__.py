"""Optimus's checkpoints (ChunyuanLI/Optimus) as our models."""

from lmvae_fast.integrations.optimus.files import is_optimus
from lmvae_fast.integrations.optimus.model import load_checkpoint

__all__ = ["is_optimus", "load_checkpoint"]
