"""Attention of packed sentences over their own memory slots and their own tokens."""

from .op import latent_attention, latent_attention_decode, latent_attention_step

__all__ = ["latent_attention", "latent_attention_decode", "latent_attention_step"]
