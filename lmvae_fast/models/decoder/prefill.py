"""The beginnings of sentences read in one parallel pass, for steps over the static cache to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.injection import Injection
from lmvae_fast.text.batch import pack

_TOKENS = 8192  # of one pass: more makes activations larger and nothing faster


@dataclass
class PrefillAttention(PackedAttention):
    """Attention of a packed batch that leaves keys and values in a cache, too.

    ``tokens``: those of the batch that are kept, None for all; ``rows``, ``positions``: where in ``cache`` each of them
    goes. ``memory`` may be the cache's own: a layer's memory is read before ``rolling`` tokens are written over it.
    """

    cache: LatentCache = field(kw_only=True)
    tokens: Tensor | None = field(kw_only=True)
    rows: Tensor = field(kw_only=True)
    positions: Tensor = field(kw_only=True)

    def attend(self, layer, query, key, value, *, scale, window, softcap, sinks=None):
        """See :class:`~lmvae_fast.models.decoder.attention.AttentionContext`."""
        out = super().attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)
        if self.tokens is not None:
            key, value = key[self.tokens], value[self.tokens]
        self.cache.write(layer, self.rows, self.positions, key, value)
        return out


def read(
    decoder: Decoder, cache: LatentCache, injection: Injection, rows: Sequence[int], ids: Sequence[Sequence[int]]
) -> None:
    """Read tokens at the beginning of sentences: the cache is then as after as many steps over them.

    Args:
        decoder: whose cache it is.
        cache: whose ``rows`` have just been started.
        injection: of the n sentences, in their order.
        rows: n rows of the cache.
        ids: what each of the n sentences begins with, start token included; sentences without any are left as they are.
    """
    begun = [place for place, tokens in enumerate(ids) if len(tokens)]
    for part in _parts(begun, [len(tokens) for tokens in ids]):
        run = slice(part[0], part[-1] + 1)  # neighbours are chosen without a copy of their memory
        chosen = run if run.stop - run.start == len(part) else torch.tensor(part, device=cache.step.device)
        _read(decoder, cache, injection.select(chosen), [rows[place] for place in part], [ids[place] for place in part])


def _parts(places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """The places in their order, in lists of few enough tokens for one pass."""
    part: list[int] = []
    for place in places:
        if part and sum(lengths[p] for p in part) + lengths[place] > _TOKENS:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def _read(
    decoder: Decoder, cache: LatentCache, injection: Injection, rows: list[int], ids: list[Sequence[int]]
) -> None:
    device = cache.step.device
    packed = {name: torch.as_tensor(value) for name, value in pack(ids, ids).items()}
    lengths, where = torch.tensor([len(tokens) for tokens in ids]), torch.tensor(rows)
    sentence, index, tokens = packed["rows"], packed["token_index"], None
    if cache.visibility == "rolling":  # all tokens of a sentence share two places: the last two of them stay
        tokens = (index >= lengths[sentence] - 2).nonzero().squeeze(1)
    kept = slice(None) if tokens is None else tokens
    attention = partial(
        PrefillAttention,
        cache=cache,
        tokens=None if tokens is None else tokens.to(device),
        rows=where[sentence[kept]].to(device),
        positions=cache.places(index[kept]).to(device),
    )
    decoder.hidden(
        packed["input_ids"].to(device),
        injection,
        cu_seqlens=packed["cu_seqlens"].to(device),
        max_seqlen=int(lengths.max()),
        rows=sentence.to(device),
        token_index=index.to(device),
        attention=attention,
    )
    cache.step.index_copy_(0, where.to(device), lengths.to(device))
