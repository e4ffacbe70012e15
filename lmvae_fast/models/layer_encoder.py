"""An encoder made of a decoder's first layers, with learned queries at the end of what it reads.

Of CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE): trainable copies of the first layers, whose
last states at Q learned queries are normed and give the posterior. What is read is packed, so nothing is padded; the two other
ways of the public code, which pads, are here too: with padding that its Llama encoder attends to, and without causality.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.models.decoder.attention import AttentionContext, PackedAttention
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.text.batch import Batch

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_QUERY_ROWS = 10_000  # of the embedding, whose means the queries begin as


class PaddedAttention:
    """Attention over padded rows with scores moved by ``bias``, for packed queries, keys and values.

    Args:
        places: where each token goes in the padded rows laid end to end, int64 ``[T]``.
        batch, length: of the padded rows.
        bias: additive, ``[batch, 1, 1 or length, length]``.
    """

    def __init__(self, places: Tensor, batch: int, length: int, bias: Tensor):
        self.places, self.batch, self.length, self.bias = places, batch, length, bias

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """See :class:`~lmvae_fast.models.decoder.attention.AttentionContext`."""
        if softcap is not None or (window is not None and window < self.length):
            raise UnsupportedDecoderError(
                "an encoder that pads has no sliding window and no soft cap", value=f"layer {layer}",
                remedy="use encoder_padding='masked'",
            )  # fmt: skip
        query, key, value = (self._padded(tensor) for tensor in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.bias.to(query.dtype), scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.places)

    def _padded(self, packed: Tensor) -> Tensor:
        rows = packed.new_zeros(self.batch * self.length, *packed.shape[1:]).index_copy(0, self.places, packed)
        return rows.unflatten(0, (self.batch, self.length)).transpose(1, 2)


class LayerEncoder(nn.Module):
    """A decoder's first layers as an encoder.

    Args:
        decoder: whose layers are copied; they train, in float32 at least.
        layers: how many.
        queries: Q.
        own_embedding: train a copy of the token embedding, too; otherwise the decoder's own is read, and frozen.
        end_trains: whether the end token's row of such a copy trains: in the public code's Llama form it does not.
        padding: ``masked``, or ``released``: padding that a batch brings is read, with 1/e of a token's weight.
        causal: whether a token sees only those before it.
        positions: whether tokens have positions, where the decoder's are learned (GPT-2's word embedding alone is used).
        input_norm: a layer norm before the layers. All three are the older form's on GPT-2.
        norm: of the last states: ``rms`` or ``layer``; eps: of both norms.
        query_std: the queries begin as draws with this deviation; None: as means of strided rows of the embedding.

    Attributes:
        trains: True: its layers always do.
        width: numbers it gives for a sentence: Q times the hidden size.

    Raises:
        ConfigError: more layers than the decoder has.
        UnsupportedDecoderError: the decoder's body is not a list of layers with a norm behind.
    """

    trains, source = True, None

    def __init__(
        self,
        decoder: Decoder,
        *,
        layers: int = 2,
        queries: int = 4,
        own_embedding: bool = False,
        end_trains: bool = False,
        padding: str = "masked",
        causal: bool = True,
        positions: bool = True,
        input_norm: bool = False,
        norm: str = "rms",
        eps: float = 1e-6,
        query_std: float | None = None,
    ):
        super().__init__()
        hidden = decoder.hidden_size
        self.queries, self.padding, self.causal, self.norm, self.eps = queries, padding, causal, norm, eps
        self.layers = first_layers(decoder.model, layers)
        if not positions and hasattr(self.layers, "wpe"):
            self.layers.wpe = _NoPositions()
        table = decoder.model.get_input_embeddings()
        rows = cast(Tensor, table.weight).detach()
        start = torch.randn(queries, hidden) * query_std if query_std is not None else strided_means(rows, queries)
        self.query = nn.Parameter(start.to(rows.device, torch.promote_types(rows.dtype, torch.float32)))
        self.embedding: Any = None
        if own_embedding:
            self.embedding = copy.deepcopy(table).requires_grad_(True)
            self.embedding.padding_idx = None if end_trains else decoder.tokenizer.eos_token_id
        self._tables: list[Any] = [table]  # in a list: it is the decoder's and no part of this module
        self.norm_weight = nn.Parameter(torch.ones(hidden))
        self.norm_bias = nn.Parameter(torch.zeros(hidden)) if norm == "layer" else None
        self.input_norm = nn.LayerNorm(hidden, eps=eps) if input_norm else None
        dtype = torch.promote_types(decoder.dtype, torch.float32)
        self.to(device=decoder.device, dtype=dtype)

    @property
    def width(self) -> int:
        """See the class."""
        return self.queries * self.query.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.query.device

    def features(self, batch: Batch) -> Tensor:
        """Normed states at the queries of every sentence, ``[B, width]``."""
        if batch.encoder_cu_seqlens is None or batch.encoder_ids is None:
            raise ConfigError(
                "this encoder reads packed prompts with responses", value="a batch of sentences",
                remedy="make it with model.make_batch of model.tokenize([PromptResponse(...), ...])",
            )  # fmt: skip
        return self(batch.encoder_ids, batch.encoder_cu_seqlens, batch.encoder_max_seqlen, batch.encoder_mask)

    def forward(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, mask: Tensor | None = None) -> Tensor:
        """Normed states at the queries, ``[B, width]``.

        Args:
            ids: packed, int64 ``[T]``; cu_seqlens: where each sentence begins, int32 ``[B + 1]``; max_seqlen: of the longest.
            mask: 0 on padding, int64 ``[T]``; None for none. Only the released encoder reads padding.
        """
        batch, device = cu_seqlens.shape[0] - 1, ids.device
        lengths = cu_seqlens.diff().long()
        rows = torch.repeat_interleave(torch.arange(batch, device=device), lengths, output_size=ids.shape[0])
        table = self._tables[0] if self.embedding is None else self.embedding
        states = torch.cat([table(ids).to(self.query.dtype), self.query.repeat(batch, 1)])
        # Every row's queries go behind its tokens.
        tokens = torch.arange(ids.shape[0], device=device) + self.queries * rows
        ends = (cu_seqlens[1:].long() + self.queries * torch.arange(batch, device=device)).unsqueeze(1)
        asked = (ends + torch.arange(self.queries, device=device)).flatten()
        order = torch.argsort(torch.cat([tokens, asked]))
        states = states.index_select(0, order)
        offsets = cu_seqlens + self.queries * torch.arange(batch + 1, device=device, dtype=cu_seqlens.dtype)
        row_of = torch.cat([rows, torch.arange(batch, device=device).repeat_interleave(self.queries)])[order]
        places = torch.arange(order.shape[0], device=device) - offsets[:-1].long()[row_of]
        if self.input_norm is not None:
            states = self.input_norm(states)
        context = self._context(offsets, max_seqlen + self.queries, row_of, places, mask, order)
        out = self.layers(
            inputs_embeds=states.unsqueeze(0), position_ids=places.unsqueeze(0), use_cache=False, lmvae=context
        )
        states = out.last_hidden_state.squeeze(0).index_select(0, asked)
        shape = states.shape[-1:]
        if self.norm_bias is not None:
            states = nn.functional.layer_norm(states, shape, self.norm_weight, self.norm_bias, self.eps)
        else:
            states = nn.functional.rms_norm(states, shape, self.norm_weight, self.eps)
        return states.view(batch, -1)

    def _context(
        self, offsets: Tensor, length: int, row_of: Tensor, places: Tensor, mask: Tensor | None, order: Tensor
    ) -> AttentionContext:
        """What the layers attend through: packed and causal, or padded rows with their mask."""
        batch = offsets.shape[0] - 1
        if self.causal and (mask is None or self.padding == "masked"):
            if mask is not None:
                raise ConfigError("a masked encoder reads no padding", remedy="leave it out of the packed ids")
            return PackedAttention(None, "prefix", offsets, length)
        spots = row_of * length + places  # in the padded rows
        ones = torch.ones_like(spots) if mask is None else torch.cat([mask, mask.new_ones(batch * self.queries)])[order]
        added = self.query.new_zeros(batch * length).index_copy(0, spots, ones.to(self.query.dtype))
        added = added.view(batch, 1, 1, length)
        never = torch.finfo(added.dtype).min
        if not self.causal:
            return PaddedAttention(spots, batch, length, torch.where(added > 0, 0.0, never))
        # The public code adds the mask of ones and zeros to the scores as it is.
        there = torch.zeros_like(added, dtype=torch.bool).view(-1).index_fill(0, spots, True).view(batch, 1, 1, length)
        future = torch.ones(length, length, dtype=torch.bool, device=added.device).triu(1)
        return PaddedAttention(spots, batch, length, torch.where(future | ~there, never, added))


class QueryHead(nn.Module):
    """From the states at Q queries to mu and logvar: of each query's numbers the first half are means, the rest log variances.

    It begins at mu = logvar = 0.

    Args:
        hidden: width of a state; latent_dim: nz; queries: Q, of which nz must be a multiple.
        activation: ``silu`` or ``gelu``; std: deviation that its first layer begins with.
    """

    def __init__(self, hidden: int, latent_dim: int, queries: int, *, activation: str = "silu", std: float = 0.02):
        super().__init__()
        self.queries = queries
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 2 * latent_dim // queries)
        self.activation = nn.functional.silu if activation == "silu" else nn.functional.gelu
        nn.init.normal_(self.hidden.weight, std=std)
        for parameter in (self.hidden.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(parameter)

    @property
    def weight(self) -> Tensor:
        """Of the last layer: its device and dtype are the posterior's."""
        return self.out.weight

    def forward(self, features: Tensor) -> Tensor:
        """mu and logvar side by side, ``[B, 2 nz]``, of features ``[B, Q * hidden]``."""
        states = features.unflatten(-1, (self.queries, -1))
        mu, logvar = self.out(self.activation(self.hidden(states))).chunk(2, dim=-1)
        return torch.cat([mu.flatten(1), logvar.flatten(1)], dim=-1)


class _NoPositions(nn.Module):
    """Instead of learned positions: nothing."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device).expand(*positions.shape, 1)


def strided_means(table: Tensor, queries: int) -> Tensor:
    """Q rows ``[Q, hidden]``: the q-th is the mean of rows q, Q + q, 2 Q + q, .. of the table's first 10,000."""
    rows = min(_QUERY_ROWS, len(table)) // queries
    return table[: rows * queries].float().view(rows, queries, -1).mean(0)


def first_layers(model: PreTrainedModel, count: int) -> Any:
    """A trainable copy of a causal LM's body with its first layers alone, without embedding, last norm and dropout.

    It takes ``inputs_embeds`` and attends through ours. Raises ConfigError, UnsupportedDecoderError; see LayerEncoder.
    """
    body = model.base_model
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 1 <= count <= total:
        raise ConfigError("encoder_layers are the decoder's first", value=count, limit=f"1 to {total}")
    lists = [
        (parent, name)
        for parent in body.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    norm = next((name for name in _NORMS if len(lists) == 1 and hasattr(lists[0][0], name)), None)
    if norm is None:
        raise UnsupportedDecoderError(
            f"{type(body).__name__} is not one list of layers with a norm behind them, so no encoder can be made of it",
            remedy="use a decoder of another family (GPT-2, Llama, Qwen, Mistral, Gemma, ...)",
        )
    parent, name = lists[0]
    later = list(getattr(parent, name))[count:]
    left_out = [*later, model.get_input_embeddings(), getattr(parent, norm)]
    copied: Any = copy.deepcopy(body, {id(module): nn.Identity() for module in left_out})
    for module in copied.modules():
        if isinstance(getattr(module, name, None), nn.ModuleList) and len(getattr(module, name)) == total:
            setattr(module, name, nn.ModuleList(list(getattr(module, name))[:count]))
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = copied.config.get_text_config(decoder=True)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:count]
    return copied.requires_grad_(True)
