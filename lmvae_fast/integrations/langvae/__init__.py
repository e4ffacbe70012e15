"""LangVAE 0.6.13: its checkpoints read and written, its figures reproduced."""

from lmvae_fast.integrations.langvae.model import load_checkpoint, load_reference, save_checkpoint

__all__ = ["load_checkpoint", "load_reference", "save_checkpoint"]
