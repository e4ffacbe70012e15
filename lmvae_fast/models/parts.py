"""The parts that a configuration asks for: loaded, built, and checked against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.memory import check_memory
from lmvae_fast.models.adapter import AdapterProjector
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.tuning import Tuning
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.latent_heads import BagOfWordsHead, EmbeddingHead, SkipHead
from lmvae_fast.models.layer_encoder import LayerEncoder, QueryHead
from lmvae_fast.models.posterior_head import WhitenedHead
from lmvae_fast.models.projectors import LinearProjector, SharedProjector

AnyEncoder = Encoder | LayerEncoder


def tuning_of(config: LMVAEConfig) -> Tuning:
    """What of the decoder trains, by a configuration."""
    return Tuning(config.decoder_part or "all", config.lora_rank, config.lora_alpha)


def located(config: LMVAEConfig) -> LMVAEConfig:
    """The configuration with parts that are folders or files named by their whole path, which holds wherever one goes."""
    parts = {"encoder": config.encoder, "decoder": config.decoder}
    return config.replace(**{name: str(Path(part).resolve()) for name, part in parts.items() if Path(part).exists()})


def load_decoder(config: LMVAEConfig) -> Decoder:
    """The decoder that a configuration names; raises what :meth:`Decoder.load` raises."""
    return Decoder.load(
        config.decoder,
        dtype=getattr(torch, config.dtype),
        train=bool(config.train_decoder),
        tuning=tuning_of(config),
        add_prefix_space=bool(config.add_prefix_space),
        start_token=config.start_token,
    )


def load_encoder(config: LMVAEConfig, decoder: Decoder) -> AnyEncoder:
    """The encoder that a configuration names, or one of the decoder's layers.

    Raises what :meth:`Encoder.load` and :class:`LayerEncoder` raise.
    """
    if config.encoder_kind == "decoder_layers":
        form = _Form(decoder)
        return LayerEncoder(
            decoder,
            layers=config.encoder_layers,
            queries=config.queries,
            own_embedding=config.stage != 2,
            end_trains=form.older,
            padding=config.encoder_padding,
            causal=not form.older,
            positions=not form.older,
            input_norm=form.older,
            norm=form.norm,
            eps=form.eps,
            query_std=form.std if form.older else None,
        )
    return Encoder.load(
        config.encoder,
        dtype=getattr(torch, config.dtype),
        pooling=str(config.pooling),
        normalize=bool(config.normalize),
        train=bool(config.train_encoder),
        segments=config.pooling_segments,
        layer=config.encoder_layer,
    )


class _Form:
    """What differs between the two published forms of the CVAE, an older one on GPT-2, and what the decoder says of itself."""

    def __init__(self, decoder: Decoder):
        config: Any = decoder.model.config.get_text_config(decoder=True)
        self.older = config.model_type == "gpt2"
        self.norm, self.activation = ("layer", "gelu") if self.older else ("rms", "silu")
        names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
        self.eps = next((float(getattr(config, name)) for name in names if hasattr(config, name)), 1e-5)
        self.std = float(getattr(config, "initializer_range", 0.02))


def build_posterior_head(config: LMVAEConfig, encoder: AnyEncoder, decoder: Decoder) -> nn.Module:
    """From an encoder's features to mu and logvar side by side."""
    if isinstance(encoder, LayerEncoder):
        form = _Form(decoder)
        return QueryHead(
            decoder.hidden_size, config.latent_dim, encoder.queries, activation=form.activation, std=form.std
        )
    width = encoder.width + len(config.annotations)
    if config.posterior_init == "whitened":
        return WhitenedHead(width, config.latent_dim)
    return nn.Linear(width, 2 * config.latent_dim, bias=False)


def build_embedding_shift(config: LMVAEConfig, decoder: Decoder, width: int) -> nn.Module | None:
    """From ``width`` numbers to what is added to every token embedding, as configured; None where nothing is."""
    if not config.embedding_shift:
        return None
    if config.shift_kind == "mlp":
        return EmbeddingHead(width, decoder.hidden_size)
    return nn.Linear(width, decoder.hidden_size, bias=False)


def build_residual(config: LMVAEConfig, decoder: Decoder, width: int) -> SkipHead | None:
    """From ``width`` numbers to what is added to the final hidden state, as configured; None where nothing is."""
    if config.output_residual in (None, "none"):
        return None
    form = _Form(decoder)
    return SkipHead(
        width, decoder.hidden_size, kind=str(config.output_residual), activation=form.activation, norm=form.norm,
        eps=form.eps,
    )  # fmt: skip


def build_bag_of_words(config: LMVAEConfig, decoder: Decoder) -> BagOfWordsHead | None:
    """What says words from latents alone, as configured."""
    return BagOfWordsHead(config.latent_dim, decoder.head_weight) if config.bag_of_words else None


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
    if config.projector == "adapter":
        form = _Form(decoder)
        return AdapterProjector(
            width,
            decoder,
            slots=int(config.slots or 1),
            middle=config.projector_hidden or (decoder.hidden_size if form.older else None),
            own_projections=config.stage != 2,
            norm=form.norm,
            eps=form.eps,
        )
    return LinearProjector(
        width, slots=int(config.slots or 1), dropout=dropout, hidden=config.projector_hidden, **shape
    )


def check_sizes(
    config: LMVAEConfig, encoder: AnyEncoder, decoder: Decoder, saved: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Before the maps from and to the latent are made: they fit into memory, and have the shapes of the saved ones, by name.

    Raises MemoryLimitError, and CheckpointError for shapes that a saved configuration contradicts.
    """
    width = config.latent_dim + len(config.annotations) * config.conditional_decoder
    remedy = "lower latent_dim, slots, max_len or projector_hidden"
    if isinstance(encoder, LayerEncoder):  # its maps are made of the decoder's own layers
        form, slots = _Form(decoder), int(config.slots or 1)
        middle = config.projector_hidden or (decoder.hidden_size if form.older else math.isqrt(decoder.hidden_size))
        numbers = 2 * config.latent_dim * decoder.hidden_size
        numbers += decoder.num_layers * middle * (width + slots * decoder.hidden_size)
        check_memory("the maps from and to the latent", remedy, 4 * numbers, decoder.device)
        return
    with torch.device("meta"):
        made = {
            "posterior_head": build_posterior_head(config, encoder, decoder),
            "projector": build_projector(config, decoder, width) if config.projector != "adapter" else None,
            "embedding_shift": build_embedding_shift(config, decoder, width),
            "residual": build_residual(config, decoder, width),
        }  # fmt: skip
    maps = nn.ModuleDict({name: module for name, module in made.items() if module is not None})
    shapes = {name: tuple(value.shape) for name, value in maps.named_parameters()}
    for name, shape in shapes.items():
        if saved is not None and name in saved and tuple(saved[name]) != shape:
            raise CheckpointError(
                f"weight {name} has another shape than the configuration says", value=list(saved[name]), limit=list(shape),
                remedy="restore configuration and weights from one copy",
            )  # fmt: skip
    check_memory("the maps from and to the latent", remedy, 4 * sum(map(math.prod, shapes.values())), decoder.device)


def start_latent_map(module: nn.Module, kind: str) -> None:
    """Give a map from or to the latent its start values: ``uniform`` keeps those it was built with, ``normal`` draws
    N(0, 0.02^2) for weights and sets biases to 0, as ChunyuanLI/Optimus does."""
    if kind == "normal":
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


def check_parts(config: LMVAEConfig, encoder: AnyEncoder, decoder: Decoder) -> None:
    """Raises ConfigError where parts that were given and the configuration disagree."""
    if isinstance(encoder, LayerEncoder) != config.prompted:
        raise ConfigError(
            "the encoder given and the configuration disagree about its kind", value=type(encoder).__name__,
            limit=f"encoder_kind={config.encoder_kind!r}", remedy="make them equal",
        )  # fmt: skip
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
    if decoder.tokenizer.start_token != config.start_token:
        raise ConfigError(
            "the decoder given and the configuration disagree about the start token",
            value=f"tokenizer.start_token={decoder.tokenizer.start_token!r}, start_token={config.start_token!r}",
            remedy="make them equal",
        )
    fields = {"pooling": "pooling", "normalize": "normalize", "encoder_layer": "layer"}
    if config.pooling == "segments":
        fields["pooling_segments"] = "segments"
    for field, name in fields.items() if isinstance(encoder, Encoder) else ():
        if getattr(encoder, name) != getattr(config, field):
            raise ConfigError(
                f"the encoder given and the configuration disagree about {field}",
                value=f"encoder.{name}={getattr(encoder, name)!r}, {field}={getattr(config, field)!r}",
                remedy="make them equal",
            )
    if config.projector == "none" and config.visibility != "prefix":
        raise ConfigError(
            f"{config.visibility} visibility is about memory slots, and projector='none' makes none",
            remedy="set visibility='prefix'",
        )
