"""What memory starts as: the keys and values that a decoder's start token, or its tokens on average, have in a cache.

A decoder has learnt to read such entries. The start token's are the "attention sink" (Xiao et al., arXiv 2309.17453) that
every sentence has anyway: more copies of it change next to nothing, so that learning begins at the decoder's own likelihood,
where a random memory first has to be unlearnt. Memory keys carry no position, as a key at position 0 under rotary positions.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.models.adapter import AdapterProjector
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.key_value import SeenKeysValues, states_of
from lmvae_fast.models.projectors import LinearProjector

logger = logging.getLogger(__name__)

#: How large what z adds is at the start, of what it would be in a random memory.
SCALE = 0.02

_TOKENS = 256  # of a mean


def start_memory(config: LMVAEConfig, projector: nn.Module | None, decoder: Decoder) -> None:
    """Give a projector the start that ``config.memory_init`` asks for; a random one stays as it is."""
    if config.memory_init not in ("sink", "mean"):
        return
    if decoder.tokenizer.starts_with_end:
        logger.warning(
            "the decoder's tokenizer has no start token: sentences, and the memory (memory_init=%r), begin with its end token "
            "%r; start_token= takes another",
            config.memory_init, decoder.tokenizer.tokenizer.convert_ids_to_tokens(decoder.tokenizer.bos_token_id),
        )  # fmt: skip
    if isinstance(projector, LinearProjector):
        projector.start_at(token_memory(decoder, config.memory_init), SCALE)
    if isinstance(projector, AdapterProjector):
        projector.start_at(token_states(decoder, config.memory_init), SCALE)


@torch.no_grad()
def token_memory(decoder: Decoder, kind: str) -> Tensor:
    """Keys and values ``[layers, 2, kv_heads, head_dim]``, in the decoder's dtype, as its own attention gets them.

    kind: ``sink``: of the start token by itself, at position 0; ``mean``: the mean over tokens spread evenly over the
    vocabulary, each behind a start token, at position 0 like it, so that no key is turned.
    """
    ids, positions, lengths = _tokens(decoder, kind)
    seen = _seen(lengths)
    decoder.run(ids, positions, None, seen)
    kept = lengths[1:].long() - 1  # the last token of every sentence
    return torch.stack(
        [
            torch.stack([part[kept].mean(0) for part in (seen.keys[layer], seen.values[layer])])
            for layer in range(decoder.num_layers)
        ]
    )


def token_states(decoder: Decoder, kind: str) -> Tensor:
    """What every layer's key and value projections read of the tokens of `token_memory`, their mean: ``[layers, hidden]``.

    Raises UnsupportedDecoderError for a decoder without such projections.
    """
    ids, positions, lengths = _tokens(decoder, kind)
    states, _ = states_of(decoder, ids, positions, _seen(lengths))
    return torch.stack([state[0, lengths[1:].long() - 1].mean(0) for state in states])


def _tokens(decoder: Decoder, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Packed ids and positions ``[T]``, and where sentences begin, int32 ``[n + 1]``."""
    start = torch.tensor([decoder.tokenizer.bos_token_id], device=decoder.device)
    if kind == "sink":
        return start, torch.zeros_like(start), torch.tensor([0, 1], dtype=torch.int32, device=decoder.device)
    special = set(decoder.tokenizer.tokenizer.all_special_ids)
    count = min(len(decoder.tokenizer.tokenizer), decoder.vocab_size)
    step = max(count // _TOKENS, 1)
    ordinary = torch.tensor([token for token in range(0, count, step) if token not in special], device=decoder.device)
    ids = torch.stack([start.expand_as(ordinary), ordinary], dim=1).flatten()
    lengths = torch.arange(0, len(ids) + 1, 2, dtype=torch.int32, device=decoder.device)
    return ids, torch.zeros_like(ids), lengths


def _seen(lengths: Tensor) -> SeenKeysValues:
    return SeenKeysValues(None, "prefix", lengths, int(lengths.diff().max()))
