"""latent_kv: a latent z projected to every layer's keys and values, written straight into their cache slots."""

from .op import latent_kv

__all__ = ["latent_kv"]
