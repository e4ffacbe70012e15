"""The CVAE's parts on a Llama decoder, in plain eager torch: encoder, adapters, and what stands beside them.

Modules and parameters are named as in the public code's files (zhangjf-nlp/LLM-based-CVAE), so that those load as they
are. B sentences, S tokens, L layers, H hidden size, nz latent size, Q queries, P memory slots.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.reference.cvae_objective import PENALTIES

PADDINGS = ("masked", "released")
EMBEDDED = ("EMB-VAE", "EMB-DG-VAE")


@dataclass(frozen=True)
class CVAESettings:
    """What a CVAE is.

    Attributes:
        latent_dim: nz. queries, encoder_layers: of the encoder. slots: P.
        vae_type: the penalty by the public code's name; ``EMB-`` adds the embedding head, ``BOW-`` the bag of words.
        skip, gskip: 0 off, 1 the network with a norm, 2 one linear layer. With both on, G-Skip acts.
        stage: 0 everything trains; 1 the decoder is frozen; 2 so are the adapters' attention and the encoder's embedding.
        padding: ``masked``, or ``released``: the Llama encoder attends to padding with weight 1/e of a real token's.
        bidirectional: the GPT-2 encoder sees later tokens, as it did under SDPA attention.
        contrast: GPT-2 only: responses must also be told apart by their latents.
    """

    latent_dim: int = 32
    queries: int = 4
    encoder_layers: int = 2
    slots: int = 4
    vae_type: str = "DG-VAE"
    skip: int = 0
    gskip: int = 1
    stage: int = 2
    padding: str = "masked"
    bidirectional: bool = True
    contrast: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("vae_type", tuple(PENALTIES)), ("skip", (0, 1, 2)), ("gskip", (0, 1, 2)), ("stage", (0, 1, 2)),
            ("padding", PADDINGS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(f"unknown {name}", value=getattr(self, name), limit=allowed)
        if 2 * self.latent_dim % self.queries:
            raise ConfigError(
                "every query gives an equal share of mu and logvar", value=f"latent_dim={self.latent_dim}",
                limit=f"a multiple of queries={self.queries} / 2",
            )  # fmt: skip

    @property
    def embedded(self) -> bool:
        """Whether a second latent is added to every token embedding."""
        return self.vae_type in EMBEDDED

    @property
    def bag_of_words(self) -> bool:
        """Whether latents must also predict the response's words by themselves."""
        return self.vae_type == "BOW-VAE"


def first_queries(embedding: Tensor, queries: int) -> Tensor:
    """The learned queries' start, [Q, H]: query q is the mean of rows q, Q + q, 2 Q + q, .. of the first 10,000 rows."""
    rows = min(10_000, len(embedding)) // queries
    return embedding[: rows * queries].unflatten(0, (rows, queries)).mean(0)


def posterior_head(hidden: int, settings: CVAESettings, activation: nn.Module, std: float) -> nn.Sequential:
    """Hidden state of a query to its share of mu and logvar; begins at mu = logvar = 0."""
    head: Any = nn.Sequential(
        nn.Linear(hidden, hidden), activation, nn.Linear(hidden, 2 * settings.latent_dim // settings.queries)
    )
    for layer, deviation in ((head[0], std), (head[2], 0.0)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return head


def split_posterior(latent: Tensor) -> tuple[Tensor, Tensor]:
    """mu and logvar [B, nz] from what every query gives, [B, Q, 2 nz / Q]: its means first, then its log variances."""
    mu, logvar = latent.chunk(2, dim=-1)
    return mu.flatten(1), logvar.flatten(1)


class LlamaEncoder(nn.Module):
    """q(z | prompt, response): own copies of the decoder's embedding and first layers, learned queries at the end."""

    def __init__(self, decoder: PreTrainedModel, settings: CVAESettings):
        super().__init__()
        body: Any = decoder.model
        config = copy.deepcopy(decoder.config)
        config._attn_implementation = "eager"  # scores plus mask, softmax, values: what the released mask needs
        hidden = config.hidden_size
        self.queries, self.padding = settings.queries, settings.padding
        self.embed_tokens = copy.deepcopy(body.embed_tokens)
        self.embed_tokens.padding_idx = config.eos_token_id  # so the end-of-text's row does not train, as released
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in body.layers[: settings.encoder_layers])
        layers: Any = self.layers
        for layer in layers:
            layer.self_attn.config = config
        self.rotary_emb = copy.deepcopy(body.rotary_emb)
        self.embed_latent_queries = nn.Embedding(settings.queries, hidden)
        with torch.no_grad():
            self.embed_latent_queries.weight.copy_(first_queries(self.embed_tokens.weight, settings.queries))
        self.norm = type(body.norm)(hidden, eps=config.rms_norm_eps)
        self.h2z = posterior_head(hidden, settings, nn.SiLU(), config.initializer_range)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar [B, nz] of left-padded ids int64 [B, S] with mask [B, S]."""
        queries = self.embed_latent_queries.weight.expand(len(ids), -1, -1)
        states = torch.cat([self.embed_tokens(ids), queries], dim=1)
        length = states.shape[1]
        seen = torch.cat([mask, mask.new_ones(len(ids), self.queries)], dim=1)[:, None, None]
        never = torch.finfo(states.dtype).min
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        if self.padding == "released":  # the 0/1 mask is added as it is
            bias = seen.to(states.dtype) + torch.zeros_like(future, dtype=states.dtype).masked_fill(future, never)
        else:
            bias = torch.zeros_like(seen, dtype=states.dtype).masked_fill(future | (seen == 0), never)
        positions = torch.arange(length, device=ids.device)[None]
        rotary = self.rotary_emb(states, position_ids=positions)
        for layer in self.layers:
            states = layer(states, attention_mask=bias, position_ids=positions, position_embeddings=rotary)
        return split_posterior(self.h2z(self.norm(states[:, -self.queries :])))


class LlamaAdapter(nn.Module):
    """One layer's memory from z: a small network, a norm, then a copy of that layer's own key and value projections."""

    def __init__(self, decoder: PreTrainedModel, layer: int, settings: CVAESettings):
        super().__init__()
        hidden = decoder.config.hidden_size
        middle = math.isqrt(hidden)
        self.slots = settings.slots
        self.z2h = nn.Sequential(
            nn.Linear(settings.latent_dim, middle), nn.GELU(), nn.Linear(middle, hidden * settings.slots)
        )
        self.norm = type(decoder.model.norm)(hidden, eps=decoder.config.rms_norm_eps)
        self.self_attn = copy.deepcopy(decoder.model.layers[layer].self_attn)

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, Hkv, P, d], of z [B, nz]; cos, sin [P, d]: rotary at positions 0..P-1."""
        states = self.norm(self.z2h(z).unflatten(1, (self.slots, -1)))
        heads = (-1, self.self_attn.head_dim)
        keys = self.self_attn.k_proj(states).unflatten(2, heads).transpose(1, 2)
        values = self.self_attn.v_proj(states).unflatten(2, heads).transpose(1, 2)
        first, second = keys.chunk(2, dim=-1)
        return keys * cos + torch.cat([-second, first], dim=-1) * sin, values


class LlamaLatentDecoder(nn.Module):
    """The decoder and everything through which latents reach it."""

    def __init__(self, decoder: PreTrainedModel, settings: CVAESettings):
        super().__init__()
        check_llama(decoder)
        config = decoder.config
        hidden, nz = config.hidden_size, settings.latent_dim
        self.settings, self.config = settings, config
        self.latent_adapters = nn.ModuleList(
            LlamaAdapter(decoder, layer, settings) for layer in range(config.num_hidden_layers)
        )
        if 1 in (settings.skip, settings.gskip):
            norm = type(decoder.model.norm)(hidden, eps=config.rms_norm_eps)
            self.skip_connection = nn.Sequential(nn.Linear(nz, hidden), nn.SiLU(), nn.Linear(hidden, hidden), norm)
        elif 2 in (settings.skip, settings.gskip):
            self.skip_connection = nn.Sequential(nn.Linear(nz, hidden))
        if settings.embedded:
            self.z2emb = nn.Sequential(nn.Linear(nz, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.model = decoder.model
        # The public code's head is a module of its own, also where the decoder ties it to the embedding.
        self.lm_head = copy.deepcopy(decoder.lm_head)

    @property
    def body(self) -> nn.Module:
        """Ids to the last hidden states, after the last norm."""
        return self.model

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [B, S, H]."""
        return self.model.embed_tokens(ids)

    def memory(self, z: Tensor) -> Tensor:
        """[L, 2, B, Hkv, P, d] from z [B, nz]."""
        positions = torch.arange(self.settings.slots, device=z.device)[None]
        cos, sin = (part[0] for part in self.model.rotary_emb(z, position_ids=positions))
        return torch.stack([torch.stack(adapter(z, cos, sin)) for adapter in self.latent_adapters])

    def skip(self, zs: Tensor) -> Tensor:
        """g of every sample, zs [B, n, nz] -> [B, n, H]."""
        return self.skip_connection(zs)

    def freeze(self, stage: int) -> None:
        """Marks what trains in a stage."""
        for part in (self.model, self.lm_head):
            part.requires_grad_(stage < 1)
        for adapter in self.latent_adapters:
            adapter.self_attn.requires_grad_(stage < 2)


def check_llama(decoder: PreTrainedModel) -> None:
    """UnsupportedDecoderError unless a layer's keys and values are one projection each of its input, as in Llama."""
    attention = decoder.model.layers[0].self_attn if hasattr(getattr(decoder, "model", None), "layers") else None
    missing = [name for name in ("k_proj", "v_proj", "head_dim") if not hasattr(attention, name)]
    normed = [name for name in ("k_norm", "qk_norm") if hasattr(attention, name)]
    if missing or normed:
        raise UnsupportedDecoderError(
            f"the CVAE's adapters need the key and value projections of a Llama layer; {type(decoder).__name__} has others",
            value=f"without {missing}" if missing else f"with {normed}",
            remedy="take a decoder whose attention is Llama's, or GPT-2",
        )
