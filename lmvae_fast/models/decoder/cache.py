"""The static cache of generation: memory slots in place, one token per sentence and step, nothing concatenated.

Layouts (positions of one layer's cache; the visible part is always the first ``length`` positions):

    prefix        slots 0..M-1, then token i at M + i
    interleaved   slot j at 2j, token i at 2i + 1
    rolling       token i at i mod 2, slot j at j + 1. Token 1 thus overwrites slot 0 and token i overwrites token i - 2,
                  which is what the rule says; slots never move, so nothing is written per step but the token itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.latent_attention import latent_attention_step
from lmvae_fast.kernels.latent_attention.visibility import token_position
from lmvae_fast.memory import check_memory
from lmvae_fast.models.decoder.position_columns import slot_columns
from lmvae_fast.models.injection import Injection


class LatentCache:
    """Keys and values of ``batch`` sentences in every layer, each sentence at a step of its own.

    Args:
        layers, kv_heads, head_dim: of the decoder.
        batch: rows.
        slots: memory slots per layer.
        max_tokens: the most tokens a row will read.
        visibility: rule of the injections it will hold.
        dtype, device: of the cache.
        position_columns: how many of a key's last numbers say where it stands (ALiBi); those of slots are written here.

    Raises:
        ConfigError: the rule needs one slot per token and there are fewer slots than tokens.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        batch: int,
        slots: int,
        max_tokens: int,
        visibility: str,
        dtype: torch.dtype,
        device: torch.device,
        position_columns: int = 0,
    ):
        if visibility != "prefix" and max_tokens > slots:
            raise ConfigError(
                f"{visibility} visibility has one memory slot per token",
                value=f"{max_tokens} tokens",
                limit=f"{slots} tokens",
                remedy="generate fewer tokens",
            )
        self.visibility, self.slots, self.max_tokens = visibility, slots, max_tokens
        positions = {"prefix": slots + max_tokens, "interleaved": 2 * slots, "rolling": slots + 1}[visibility]
        numbers = 2 * layers * batch * kv_heads * positions * head_dim
        check_memory(
            f"keys and values of {batch:,} sentences of {max_tokens:,} tokens", "lower batch_size or max_new_tokens",
            numbers * dtype.itemsize, device,
        )  # fmt: skip
        self.kv = torch.zeros(layers, 2, batch, kv_heads, positions, head_dim, dtype=dtype, device=device)
        self.step = torch.zeros(batch, dtype=torch.int64, device=device)
        #: Whether all that a row's sentence has gone through was finite.
        self.finite = torch.ones(batch, dtype=torch.bool, device=device)
        self._position_columns = position_columns
        self._positions = self._lengths = self.step

    @property
    def memory(self) -> Tensor:
        """The memory slots as a view of the cache, ``[layers, 2, batch, kv_heads, slots, head_dim]``."""
        if self.visibility == "prefix":
            return self.kv[..., : self.slots, :]
        if self.visibility == "interleaved":
            return self.kv[..., 0::2, :]
        return self.kv[..., 1:, :]

    def place(self, rows: Tensor, injection: Injection) -> None:
        """Start new sentences in ``rows`` (int64 ``[n]``): their memory goes to its slots, their step to 0."""
        if injection.memory is not None:
            self.memory.index_copy_(2, rows, injection.memory.to(self.kv.dtype))
        self.restart(rows)

    def restart(self, rows: Tensor) -> None:
        """Start new sentences in ``rows`` (int64 ``[n]``) whose memory was written into :attr:`memory` itself."""
        self.step.index_fill_(0, rows, 0)
        self.finite.index_fill_(0, rows, True)
        if self._position_columns and self.slots:
            columns = slot_columns(self.slots, self.visibility, self.kv)
            self.memory[:, 0, ..., -columns.shape[-1] :] = columns

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (int64 ``[n]``), in this order."""
        self.kv, self.step, self.finite = self.kv[:, :, rows], self.step[rows], self.finite[rows]

    def narrow(self, count: int) -> None:
        """Keep only the first ``count`` rows, without a copy."""
        self.kv, self.step, self.finite = self.kv[:, :, :count], self.step[:count], self.finite[:count]

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from the tokens of row ``rows[r]`` (int64 ``[batch]``), whose memory must be its own too."""
        tokens = {"prefix": slice(self.slots, None), "interleaved": slice(1, None, 2), "rolling": slice(0, 2)}
        view = self.kv[..., tokens[self.visibility], :]
        view.copy_(view[:, :, rows])
        self.step.copy_(self.step[rows])
        self.finite.copy_(self.finite[rows])

    def copy_tokens(self, to: Tensor, of: Tensor, count: int) -> None:
        """Rows ``to`` (int64 ``[n]``) have read what rows ``of`` have, at most ``count`` tokens, under an equal memory."""
        last = 2 if self.visibility == "rolling" else token_position(max(count, 1) - 1, self.slots, self.visibility) + 1
        view = self.kv[..., :last, :]
        view.index_copy_(2, to, view.index_select(2, of))
        self.step.index_copy_(0, to, self.step[of])

    def position_ids(self) -> Tensor:
        """Position id of the token each row reads next, int64 ``[batch]``."""
        return token_position(self.step, self.slots, self.visibility)

    def places(self, index: Tensor) -> Tensor:
        """Where in the cache tokens of these indices go, int64 of any shape."""
        return index % 2 if self.visibility == "rolling" else token_position(index, self.slots, self.visibility)

    @property
    def step_places(self) -> tuple[Tensor, Tensor]:
        """Where this step's keys and values go, and how much of the cache each row sees: int64 ``[batch]`` each."""
        return self._positions, self._lengths

    def prepare(self) -> None:
        """Fix where this step's keys and values go and what each row sees; once a step, before the layers run."""
        self._positions = self.places(self.step)
        self._lengths = self.step + 2 if self.visibility == "rolling" else self._positions + 1

    def advance(self) -> None:
        """The step is done in every layer. A row that has read all it may stays where it is, and reads there again."""
        self.step.add_(1).clamp_(max=self.max_tokens - 1)

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Keys and values ``[n, kv_heads, head_dim]`` of one layer to these (row, position) pairs (int64 ``[n]``, no two
        of them equal)."""
        self.kv[layer, 0][rows, :, positions] = key.to(self.kv.dtype)
        self.kv[layer, 1][rows, :, positions] = value.to(self.kv.dtype)

    def attend(self, layer, query, key, value, *, scale, window, softcap, sinks=None):
        """One token per row: query ``[batch, heads, head_dim]``, key and value ``[batch, kv_heads, head_dim]``."""
        (keys, values), dtype = self.kv[layer].unbind(0), self.kv.dtype
        options = {"scale": scale, "window": window, "softcap": softcap}
        if sinks is not None:
            options["sinks"] = sinks
        new = (key.to(dtype), value.to(dtype))
        out = latent_attention_step(query.to(dtype), *new, keys, values, self._positions, self._lengths, **options)
        return out.to(query.dtype)
