"""latent_kv: a latent z projected to every layer's keys and values, written straight into their cache slots."""

from .adamw import latent_kv_adamw, latent_kv_norm
from .op import latent_kv, stream_tensor
from .optimizer import LatentKVAdamW
from .reference import keep_mask

__all__ = ["LatentKVAdamW", "keep_mask", "latent_kv", "latent_kv_adamw", "latent_kv_norm", "stream_tensor"]
