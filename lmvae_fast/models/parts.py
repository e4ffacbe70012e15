"""The parts that a configuration asks for: loaded, built, and checked against it."""

from __future__ import annotations

import torch
from torch import nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.tuning import Tuning
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.projectors import LinearProjector, SharedProjector


def tuning_of(config: LMVAEConfig) -> Tuning:
    """What of the decoder trains, by a configuration."""
    return Tuning(config.decoder_part, config.lora_rank, config.lora_alpha)


def load_decoder(config: LMVAEConfig) -> Decoder:
    """The decoder that a configuration names; raises what :meth:`Decoder.load` raises."""
    return Decoder.load(
        config.decoder,
        dtype=getattr(torch, config.dtype),
        train=bool(config.train_decoder),
        tuning=tuning_of(config),
        add_prefix_space=bool(config.add_prefix_space),
    )


def load_encoder(config: LMVAEConfig) -> Encoder:
    """The encoder that a configuration names; raises what :meth:`Encoder.load` raises."""
    return Encoder.load(
        config.encoder,
        dtype=getattr(torch, config.dtype),
        pooling=str(config.pooling),
        normalize=bool(config.normalize),
        train=bool(config.train_encoder),
    )


def build_projector(config: LMVAEConfig, decoder: Decoder, width: int) -> nn.Module | None:
    """From ``width`` numbers to the decoder's memory, as configured; None where there is none. Raises ConfigError."""
    shape = {"layers": decoder.num_layers, "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim}
    dropout = float(config.projector_dropout or 0.0)
    if config.projector == "none":
        return None
    if config.projector == "shared":
        if config.slots != 1:
            raise ConfigError(
                "a shared projector makes one slot per layer",
                value=f"slots={config.slots}",
                limit=1,
                remedy="set slots=1 or projector='linear'",
            )
        return SharedProjector(width, dropout=dropout, **shape)
    return LinearProjector(
        width, slots=int(config.slots or 1), dropout=dropout, hidden=config.projector_hidden, **shape
    )


def check_parts(config: LMVAEConfig, encoder: Encoder, decoder: Decoder) -> None:
    """Raises ConfigError where parts that were given and the configuration disagree."""
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        wanted = bool(getattr(config, f"train_{name}"))
        if part.trains != wanted:
            raise ConfigError(
                f"the {name} given and the configuration disagree about training it",
                value=f"{name}.trains={part.trains}, train_{name}={wanted}",
                remedy="make them equal",
            )
    if decoder.trains and decoder.tuning != tuning_of(config):
        raise ConfigError(
            "the decoder given and the configuration disagree about what of it trains",
            value=str(decoder.tuning),
            limit=str(tuning_of(config)),
            remedy="give Decoder the configuration's tuning",
        )
    for name in ("pooling", "normalize"):
        if getattr(encoder, name) != getattr(config, name):
            raise ConfigError(
                f"the encoder given and the configuration disagree about {name}",
                value=f"encoder.{name}={getattr(encoder, name)!r}, {name}={getattr(config, name)!r}",
                remedy="make them equal",
            )
    if config.projector == "none" and config.visibility != "prefix":
        raise ConfigError(
            f"{config.visibility} visibility is about memory slots, and projector='none' makes none",
            remedy="set visibility='prefix'",
        )
