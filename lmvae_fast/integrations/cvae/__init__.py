"""CVAE with G-Skip as its public code saves it (zhangjf-nlp/LLM-based-CVAE)."""

from lmvae_fast.integrations.cvae.model import load_checkpoint

__all__ = ["load_checkpoint"]
