"""Which VAE a flow belongs to: its weights, and the settings that make the same weights give other latents."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError
from lmvae_fast.files import fingerprint_tensors
from lmvae_fast.models.systems import resolve

#: Parameters of more numbers than this enter a VAE's fingerprint by as many evenly spaced ones.
SAMPLED = 1 << 20

#: Fields of LMVAEConfig that change neither a posterior nor what is decoded of a latent: names, how it was trained, how its
#: weights are held. Any other field does, one that comes later too.
NOT_OF_LATENTS = frozenset((
    "system", "encoder", "decoder", "projector_dropout", "kl_mode", "kl_target", "objective", "length_normalize",
    "count_start_token", "latent_init", "memory_init", "posterior_init", "free_running", "token_dropout", "train_encoder",
    "train_decoder", "decoder_part", "lora_rank", "stage", "residual_samples", "bag_of_words", "contrast", "group_size",
    "kl_samples", "density_floor", "dtype",
))  # fmt: skip


def vae_fingerprint(vae: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, shapes and values (float32) of a VAE's parameters, large ones sampled evenly.

    What a flow was fitted on is known by it and by :func:`vae_settings`: training the VAE further, or loading it in another
    dtype, makes another one.
    """
    named = {}
    for name, parameter in vae.named_parameters():
        flat = parameter.detach().reshape(-1)
        every = max(1, -(-flat.numel() // SAMPLED))
        named[f"{name} {tuple(parameter.shape)}"] = flat[::every].float()
    return fingerprint_tensors(named)


def vae_settings(vae: Any) -> dict[str, Any]:
    """What beside its parameters decides a VAE's posteriors, and the texts of latents: JSON values by the name of the field."""
    settings = {name: value for name, value in vae.config.to_dict().items() if name not in NOT_OF_LATENTS}
    # A folder of sentence-transformers says these of its encoder; no field does.
    settings["encoder.max_tokens"] = getattr(vae.encoder, "stated_tokens", None)
    settings["encoder.lower"] = getattr(vae.encoder, "lower", False)
    return settings


def warn_of_unknown_settings(what: Any) -> None:
    """Warn of what was written when a VAE was known by its weights alone."""
    warnings.warn(
        f"{what} was written before the settings of its VAE were: a VAE of equal weights and other settings (pooling, "
        "visibility) would not be noticed; what is written from here on says them", stacklevel=4,
    )  # fmt: skip


def check_settings(saved: Any, vae: Any) -> None:
    """Raises CheckpointError, naming the fields, where a VAE is set otherwise than what :func:`vae_settings` gave before."""
    if not isinstance(saved, dict):
        raise CheckpointError(
            "the settings of the VAE that the flow was fitted on are unreadable", value=type(saved).__name__,
            limit="a JSON object", remedy="restore the file from a copy",
        )  # fmt: skip
    current = vae_settings(vae)
    # Fields that came after it was written had what its system leaves them at now.
    saved = {**resolve(LMVAEConfig(system=vae.config.system)).to_dict(), "encoder.max_tokens": None, **saved}
    changed = [name for name, value in current.items() if saved.get(name, False) != value]
    if changed:
        raise CheckpointError(
            "the flow was fitted on another VAE, so its latents mean nothing to this one: their settings differ",
            value=", ".join(f"{name}={current[name]!r}" for name in changed),
            limit=", ".join(f"{name}={saved.get(name)!r}" for name in changed),
            remedy="give the VAE it was fitted on, with its settings, or fit a new flow",
        )  # fmt: skip
