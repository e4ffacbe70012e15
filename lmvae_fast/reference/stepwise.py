"""The step-by-step oracle: any Hugging Face causal LM, one token at a time, over a cache arranged by hand.

It states what a memory and a visibility *mean*: the parallel pass and generation are tested against it.

At step i the cache is rebuilt from the memory slots and the keys and values of earlier tokens, then the decoder's own
forward reads token i and appends its key and value. What precedes token i in the cache, in this order:

=============  =============================================  ==================
visibility     before token i                                 position of token i
=============  =============================================  ==================
prefix         all M slots, tokens 0 .. i-1                   M + i
rolling        i = 0: slot 0;  else slots 1 .. i, token i-1   i + 1
interleaved    slot 0, token 0, slot 1, token 1, .. slot i    2 i + 1
=============  =============================================  ==================

The position of a token is thus always the number of cache entries before it, and a sliding window counts cache entries.
`rolling` is what LangVAE 0.6.13 does (arXiv 2505.00004; each new slot is written over an older token), `interleaved` is
what its paper describes, `prefix` is Optimus (arXiv 2004.04092), LlaMaVAE (arXiv 2312.13208) and the CVAE with G-Skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lmvae_fast.errors import ConfigError, DataError, LatentError, UnsupportedDecoderError

VISIBILITIES = ("prefix", "rolling", "interleaved")


def past_entries(visibility: str, step: int, slots: Tensor, tokens: Tensor) -> Tensor:
    """What the cache of one layer holds before token ``step`` is read: the table above, as code.

    Args:
        visibility: one of ``VISIBILITIES``.
        step: zero-based index i of the token about to be read.
        slots: keys (or values) of the memory, [B, Hkv, M, D].
        tokens: keys (or values) of tokens 0 .. i-1, [B, Hkv, i, D].
    Returns:
        [B, Hkv, entries, D].
    """
    if visibility == "prefix":
        return torch.cat([slots, tokens], dim=2)
    if visibility == "rolling":
        if step == 0:
            return slots[:, :, :1]
        return torch.cat([slots[:, :, 1 : step + 1], tokens[:, :, -1:]], dim=2)
    pairs = torch.stack([slots[:, :, :step], tokens], dim=3).flatten(2, 3)
    return torch.cat([pairs, slots[:, :, step : step + 1]], dim=2)


def token_position(visibility: str, step: int, num_slots: int) -> int:
    """Position id (rotary or learned) of token ``step``: the number of cache entries before it."""
    return {"prefix": num_slots + step, "rolling": step + 1, "interleaved": 2 * step + 1}[visibility]


def read_token(
    model: PreTrainedModel,
    ids: Tensor,
    past: list[tuple[Tensor, Tensor]],
    position: int,
    embedding_shift: Tensor | None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The decoder's own forward on one token per sentence, over the given cache entries.

    Args:
        ids: int64 [B].
        past: per layer (keys, values), each [B, Hkv, n, D]; n may be 0.
        position: position id of this token, the same for every sentence.
        embedding_shift: [B, H], added to the token's embedding, or None.
    Returns:
        logits [B, V], and per layer this token's own key and value, each [B, Hkv, 1, D].
    """
    # Without a config every layer of DynamicCache keeps all it is given, so that a window acts through the mask alone.
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        if keys.shape[2]:
            cache.update(keys, values, layer)
    embeds = model.get_input_embeddings()(ids[:, None])
    if embedding_shift is not None:
        embeds = embeds + embedding_shift[:, None]
    position_ids = torch.full((ids.shape[0], 1), position, dtype=torch.int64, device=ids.device)
    out = model(inputs_embeds=embeds, position_ids=position_ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    lengths = {layer.get_seq_length() for layer in layers}
    if len(layers) != len(past) or lengths != {past[0][0].shape[2] + 1}:
        raise UnsupportedDecoderError(
            f"{type(model).__name__} does not append one key and value per layer and token to a plain cache",
            value=f"{len(layers)} layers of lengths {sorted(lengths)}",
            limit=f"{len(past)} layers of length {past[0][0].shape[2] + 1}",
            remedy="use a decoder whose layers all have ordinary key/value attention",
        )
    return out.logits[:, -1], [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in layers]


class StepwiseDecoder:
    """A decoder that is read one token at a time, under a memory and a visibility.

    Put the model in eval mode for a deterministic result, and give Gemma2 ``attn_implementation="eager"`` (torch's
    scaled_dot_product_attention has no soft cap). Differentiable in the memory, the shift, the residual and the model.

    Args:
        model: a Hugging Face causal LM with ordinary key/value attention.
        memory: [L, 2, B, Hkv, M, D], keys at index 0 and values at 1; None for no memory (``prefix`` only).
        visibility: ``prefix``, ``rolling`` or ``interleaved``.
        embedding_shift: [B, H], added to every token embedding (Optimus "embedding").
        output_residual: [B, H], added at every position to what the output head reads (G-Skip).
    Raises:
        ConfigError: unknown visibility, or one that needs a memory without one.
        LatentError: a memory whose layer count, kv heads or head size do not fit the decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Tensor | None,
        *,
        visibility: str = "prefix",
        embedding_shift: Tensor | None = None,
        output_residual: Tensor | None = None,
    ):
        if visibility not in VISIBILITIES:
            raise ConfigError("unknown visibility", value=visibility, limit=", ".join(VISIBILITIES))
        if memory is None and visibility != "prefix":
            raise ConfigError(f"visibility {visibility!r} needs a memory", remedy="give a memory, or use 'prefix'")
        self.model, self.memory, self.visibility = model, memory, visibility
        self.embedding_shift, self.output_residual = embedding_shift, output_residual
        self.num_slots = 0 if memory is None else memory.shape[-2]
        self.step_index = 0
        self._tokens: list[tuple[Tensor, Tensor]] | None = None  # per layer: keys and values of tokens read
        self._slots: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values of the memory
        if memory is not None:
            self._check(memory)
            # Taken apart once: at every step it would cost a gradient of the whole memory's size.
            self._slots = [(layer[0], layer[1]) for layer in memory.unbind(0)]

    def _check(self, memory: Tensor) -> None:
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        want = (config.num_hidden_layers, 2, kv_heads, head_dim)
        found = (*memory.shape[:2], memory.shape[3], memory.shape[5]) if memory.dim() == 6 else tuple(memory.shape)
        if memory.dim() != 6 or found != want:
            raise LatentError(
                "memory does not fit the decoder",
                value=tuple(memory.shape),
                limit=f"[layers={want[0]}, 2, batch, kv_heads={want[2]}, slots, head_dim={want[3]}]",
            )

    def _past(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        memory = self.memory
        if memory is None:
            config = self.model.config.get_text_config()
            empty = torch.empty(batch, 1, 0, 1)
            return self._tokens or [(empty, empty)] * config.num_hidden_layers
        empty = memory[0, 0, :, :, :0]
        tokens = self._tokens or [(empty, empty)] * memory.shape[0]
        return [
            (
                past_entries(self.visibility, self.step_index, slot_keys, keys),
                past_entries(self.visibility, self.step_index, slot_values, values),
            )
            for (slot_keys, slot_values), (keys, values) in zip(self._slots, tokens, strict=True)
        ]

    def step(self, ids: Tensor) -> Tensor:
        """Reads the next token, int64 [B], and gives the logits [B, V] of the one after it.

        Raises:
            LatentError: the memory has fewer slots than this step needs (rolling, interleaved).
            DataError: batch of ``ids`` differs from the memory's.
            UnsupportedDecoderError: the decoder does not use its cache as an ordinary key/value cache.
        """
        if self.memory is not None and ids.shape[0] != self.memory.shape[2]:
            raise DataError("batch of token ids differs from the memory's", value=len(ids), limit=self.memory.shape[2])
        if self.visibility != "prefix" and self.step_index >= self.num_slots:
            raise LatentError(
                f"visibility {self.visibility!r} needs one slot per token",
                value=f"{self.num_slots} slots at token {self.step_index}",
                remedy="project the latent to at least as many slots as tokens",
            )
        position = token_position(self.visibility, self.step_index, self.num_slots)
        hook = self._add_residual()
        try:
            logits, new = read_token(self.model, ids, self._past(ids.shape[0]), position, self.embedding_shift)
        finally:
            if hook is not None:
                hook.remove()
        if self._tokens is None or self.visibility == "rolling":  # rolling looks back one token only
            self._tokens = new
        else:
            self._tokens = [
                (torch.cat([k, dk], 2), torch.cat([v, dv], 2))
                for (k, v), (dk, dv) in zip(self._tokens, new, strict=True)
            ]
        self.step_index += 1
        return logits

    def _add_residual(self):
        if self.output_residual is None:
            return None
        residual = self.output_residual[:, None]
        head: nn.Module = self.model.get_output_embeddings()
        # Before the head, so that whatever the model does to its logits (soft cap, scale) still happens.
        return head.register_forward_pre_hook(lambda module, args: (args[0] + residual,))


def stepwise_logits(
    model: PreTrainedModel,
    ids: Tensor,
    memory: Tensor | None = None,
    *,
    visibility: str = "prefix",
    embedding_shift: Tensor | None = None,
    output_residual: Tensor | None = None,
) -> Tensor:
    """Logits of known tokens (teacher forcing), one step of the decoder per token.

    Args:
        ids: int64 [B, S], what the decoder reads (bos, t0, t1, ...). Others as in :class:`StepwiseDecoder`.
    Returns:
        [B, S, V]; row s is the prediction of the token after ``ids[:, s]``.
    """
    decoder = StepwiseDecoder(
        model, memory, visibility=visibility, embedding_shift=embedding_shift, output_residual=output_residual
    )
    return torch.stack([decoder.step(ids[:, step]) for step in range(ids.shape[1])], dim=1)


def stepwise_greedy(
    model: PreTrainedModel,
    start_ids: Tensor,
    steps: int,
    memory: Tensor | None = None,
    *,
    visibility: str = "prefix",
    embedding_shift: Tensor | None = None,
    output_residual: Tensor | None = None,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(dim=-1),
) -> tuple[Tensor, Tensor]:
    """Free-running decoding: every token read is the one chosen before it.

    Args:
        start_ids: int64 [B], the first token read (bos).
        steps: number of tokens to produce, exactly (nothing stops at eos).
        choose: logits [B, V] -> ids [B]; greedy by default.
    Returns:
        ids [B, steps] (``start_ids`` not included) and logits [B, steps, V].
    """
    decoder = StepwiseDecoder(
        model, memory, visibility=visibility, embedding_shift=embedding_shift, output_residual=output_residual
    )
    ids, logits, current = [], [], start_ids
    for _ in range(steps):
        logits.append(decoder.step(current))
        current = choose(logits[-1])
        ids.append(current)
    return torch.stack(ids, dim=1), torch.stack(logits, dim=1)
