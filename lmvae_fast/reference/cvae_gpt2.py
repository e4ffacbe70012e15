"""The CVAE's parts on GPT-2, an older form of the method (CVAE with G-Skip; behaviour of zhangjf-nlp/LLM-based-CVAE).

It differs from the Llama form in its norms and activations, masks padding, puts no position on encoder tokens or memory,
and its encoder's blocks see later tokens too, as they do where SDPA attention is given a mask. Parameters are named as in
the public code's files.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.errors import ConfigError
from lmvae_fast.reference.cvae_parts import CVAESettings, posterior_head, split_posterior


class GPT2Encoder(nn.Module):
    """q(z | prompt, response): word embeddings without positions, learned queries at the end, a norm, two blocks."""

    def __init__(self, decoder: PreTrainedModel, settings: CVAESettings):
        super().__init__()
        body: Any = decoder.transformer
        config = copy.deepcopy(decoder.config)
        config._attn_implementation = "eager"  # scores plus the mask we give: nothing else decides what is seen
        self.queries, self.bidirectional = settings.queries, settings.bidirectional
        self.wte: Any = copy.deepcopy(body.wte)
        self.latent_queries = nn.Parameter(torch.randn(1, settings.queries, config.n_embd) * config.initializer_range)
        self.ln_input = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in body.h[: settings.encoder_layers])
        blocks: Any = self.blocks
        for block in blocks:
            block.attn.config = config
        self.ln_output = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.h2z = posterior_head(config.n_embd, settings, nn.GELU(), config.initializer_range)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar [B, nz] of left-padded ids int64 [B, S] with mask [B, S]."""
        states = torch.cat([self.wte(ids), self.latent_queries.expand(len(ids), -1, -1)], dim=1)
        hidden = torch.cat([mask, mask.new_ones(len(ids), self.queries)], dim=1)[:, None, None] == 0
        if not self.bidirectional:
            hidden = hidden | torch.ones(2 * states.shape[1:2], dtype=torch.bool, device=ids.device).triu(1)
        bias = torch.zeros_like(hidden, dtype=states.dtype).masked_fill(hidden, torch.finfo(states.dtype).min)
        states = self.ln_input(states)
        for block in self.blocks:
            states = block(states, attention_mask=bias)
        return split_posterior(self.h2z(self.ln_output(states[:, -self.queries :])))


class GPT2Adapter(nn.Module):
    """One layer's memory from z: a small network, a norm, a copy of that layer's own key and value projections."""

    def __init__(self, decoder: PreTrainedModel, layer: int, settings: CVAESettings):
        super().__init__()
        config = decoder.config
        self.slots = settings.slots
        self.z2h = nn.Sequential(
            nn.Linear(settings.latent_dim, config.n_embd),
            nn.GELU(),
            nn.Linear(config.n_embd, config.n_embd * self.slots),
        )
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        body: Any = decoder.transformer
        self.attn = copy.deepcopy(body.h[layer].attn)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, H, P, d], of z [B, nz]."""
        states = self.ln(self.z2h(z).unflatten(1, (self.slots, -1)))
        keys, values = self.attn.c_attn(states).chunk(3, dim=-1)[1:]
        heads = (-1, self.attn.head_dim)
        return keys.unflatten(2, heads).transpose(1, 2), values.unflatten(2, heads).transpose(1, 2)


class GPT2LatentDecoder(nn.Module):
    """The decoder and everything through which latents reach it."""

    def __init__(self, decoder: PreTrainedModel, settings: CVAESettings):
        super().__init__()
        if settings.embedded or settings.bag_of_words or 2 in (settings.skip, settings.gskip):
            raise ConfigError(
                "the GPT-2 form of the CVAE has no such part",
                value=f"vae_type={settings.vae_type}, skip={settings.skip}, gskip={settings.gskip}",
                limit="memory, skip 1 and gskip 1", remedy="take a Llama decoder for it",
            )  # fmt: skip
        self.settings, self.config = settings, decoder.config
        hidden = self.config.n_embd
        self.latent_translators = nn.ModuleList(
            GPT2Adapter(decoder, layer, settings) for layer in range(self.config.n_layer)
        )
        if settings.skip or settings.gskip:
            self.skip_connection = nn.Sequential(
                nn.Linear(settings.latent_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            )
        self.transformer: Any = decoder.transformer
        self.lm_head = copy.deepcopy(decoder.lm_head)

    @property
    def body(self) -> nn.Module:
        """Ids to the last hidden states, after the last norm."""
        return self.transformer

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings [B, S, H]."""
        return self.transformer.wte(ids)

    def memory(self, z: Tensor) -> Tensor:
        """[L, 2, B, H, P, d] from z [B, nz]; no position is put on it."""
        return torch.stack([torch.stack(adapter(z)) for adapter in self.latent_translators])

    def skip(self, zs: Tensor) -> Tensor:
        """g of every sample, zs [B, n, nz] -> [B, n, H]; its norm has no weights."""
        states = self.skip_connection(zs)
        return nn.functional.layer_norm(states, states.shape[-1:], eps=self.config.layer_norm_epsilon)

    def freeze(self, stage: int) -> None:
        """Marks what trains: the decoder in stage 0 alone, everything else in any."""
        for part in (self.transformer, self.lm_head):
            part.requires_grad_(stage < 1)
