"""The decode engine: any number of latents to text, in batches over one static cache.

A row whose sentence has ended takes the next latent at once, so the batch stays full; memory is projected for a whole
batch of waiting latents at a time, because one projection reads every weight of the projector whatever its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.generation.sampling import select_tokens
from lmvae_fast.models.cache import LatentCache
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.modes import evaluating


@dataclass(frozen=True)
class Generated:
    """One decoded latent: its row in the input, its text, its token ids, and whether it ended by an end token."""

    index: int
    text: str
    ids: list[int]
    finished: bool


def generate(
    model: LMVAE,
    latents: Tensor | Iterable[Tensor],
    config: GenerationConfig | None = None,
    *,
    annotations: Tensor | None = None,
    first_index: int = 0,
) -> Iterator[Generated]:
    """Decode latents, in their order.

    Args:
        model: any LMVAE.
        latents: ``[N, latent_dim]``, or an iterable of such blocks (read one at a time).
        config: how; greedy by default.
        annotations: pooled labels ``[N, labels]`` of a conditional decoder (``latents`` must then be one tensor).
        first_index: index of the first latent: what a resumed stream continues from.

    Raises:
        LatentError: latents of another width or dtype, or with NaN or Inf; none of that block is decoded then.
        ConfigError: more tokens asked for than the model's memory or positions allow.
    """
    config = config or GenerationConfig()
    limit = token_limit(model, config)
    blocks = _blocks(model, latents, annotations, config.batch_size)
    seed = None
    if config.do_sample:
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    return _run(model, blocks, config, limit, seed, first_index)


def token_limit(model: LMVAE, config: GenerationConfig) -> int:
    """Tokens a sentence may have under this configuration; ConfigError past what the model allows."""
    slots = int(model.config.slots or 0)
    if config.max_new_tokens is None:
        return model.config.max_len
    if model.config.visibility != "prefix" and config.max_new_tokens > model.config.max_len:
        raise ConfigError(
            f"{model.config.visibility} visibility has a memory slot for each of max_len tokens and no more",
            value=f"max_new_tokens={config.max_new_tokens}", limit=f"max_len={model.config.max_len}",
            remedy="ask for fewer tokens",
        )  # fmt: skip
    model.decoder.check_positions(slots, config.max_new_tokens, str(model.config.visibility))
    return config.max_new_tokens


def _blocks(model, latents, annotations, batch_size) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of at most batch_size checked latents. A tensor is checked whole before the first block is given out."""
    if isinstance(latents, Tensor):
        model.check_latents(latents)
        if annotations is not None and annotations.shape[0] != latents.shape[0]:
            raise LatentError(
                "one row of pooled labels per latent", value=list(annotations.shape), limit=f"[{latents.shape[0]}, labels]"
            )
        latents = [latents]
    elif annotations is not None:
        raise LatentError("annotations need the latents as one tensor", value=type(latents).__name__)

    def split():
        for block in latents:
            model.check_latents(block)
            labels = [None] * block.shape[0] if annotations is None else annotations.split(batch_size)
            yield from zip(block.split(batch_size), labels, strict=False)

    return split()


class _Waiting:
    """Latents projected but not started: one block at a time, handed out row by row."""

    def __init__(self, model: LMVAE, blocks: Iterator[tuple[Tensor, Tensor | None]]):
        self.model, self.blocks = model, blocks
        self.block: Injection | None = None
        self.next = 0

    def take(self, count: int) -> Injection | None:
        """Up to ``count`` rows; None when there is nothing left."""
        if self.block is None or self.next == self.block.batch_size:
            z, labels = next(self.blocks, (None, None))
            if z is None:
                return None
            weight = self.model.posterior_head.weight
            z = z.to(device=weight.device, dtype=weight.dtype)
            self.block, self.next = self.model.inject(z, None if labels is None else labels.to(weight.device)), 0
        start, self.next = self.next, min(self.next + count, self.block.batch_size)
        return self.block.select(slice(start, self.next))


class _Rows:
    """The sentences being decoded: one cache row each."""

    def __init__(self, model: LMVAE, first: Injection, limit: int):
        self.model, device = model, model.decoder.device
        self.size = first.batch_size
        self.cache: LatentCache = model.decoder.new_cache(first, batch=self.size, max_tokens=limit)
        # What is not memory is kept per row and overwritten when a row starts a new sentence.
        self.injection = Injection(
            first.visibility, None if first.memory is None else self.cache.memory,
            *(None if part is None else part.detach().clone() for part in (first.embedding_shift, first.output_residual)),
        )  # fmt: skip
        self.token = torch.empty(self.size, dtype=torch.int64, device=device)
        self.ids: list[list[int]] = [[] for _ in range(self.size)]
        self.index = [-1] * self.size

    def start(self, rows: list[int], injection: Injection, first_index: int) -> None:
        where = torch.tensor(rows, dtype=torch.int64, device=self.token.device)
        self.cache.place(where, injection)
        for name in ("embedding_shift", "output_residual"):
            if (part := getattr(injection, name)) is not None:
                getattr(self.injection, name).index_copy_(0, where, part)
        self.token.index_fill_(0, where, self.model.decoder.tokenizer.bos_token_id)
        for offset, row in enumerate(rows):
            self.ids[row], self.index[row] = [], first_index + offset

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows: what is left runs in a smaller batch."""
        where = torch.tensor(rows, dtype=torch.int64, device=self.token.device)
        self.cache.select(where)
        parts = (self.injection.embedding_shift, self.injection.output_residual)
        self.injection = Injection(
            self.injection.visibility, None if self.injection.memory is None else self.cache.memory,
            *(None if part is None else part[where] for part in parts),
        )  # fmt: skip
        self.token = self.token[where]
        self.ids, self.index = [self.ids[row] for row in rows], [self.index[row] for row in rows]
        self.size = len(rows)


def _run(model, blocks, config, limit, seed, first_index) -> Iterator[Generated]:
    eos = model.decoder.tokenizer.eos_token_id
    waiting = _Waiting(model, blocks)
    with evaluating(model):  # never held while a consumer has control
        first = waiting.take(config.batch_size)
        if first is None:
            return
        rows = _Rows(model, first, limit)
        rows.start(list(range(rows.size)), first, first_index)
    started, emitted = first_index + rows.size, first_index
    done: dict[int, Generated] = {}
    while rows.size:
        with evaluating(model):
            logits = model.decoder.step(rows.token, rows.cache, rows.injection)
            steps = torch.tensor([len(ids) for ids in rows.ids])
            rows.token = select_tokens(logits, config, seed=seed, sentence=torch.tensor(rows.index), step=steps)
        ended = []
        for row, token in enumerate(rows.token.tolist()):
            if token != eos:
                rows.ids[row].append(token)
            if token == eos or len(rows.ids[row]) == limit:
                ended.append((row, token == eos))
        if not ended:
            continue
        texts = model.decoder.tokenizer.decode([rows.ids[row] for row, _ in ended])
        for (row, finished), text in zip(ended, texts, strict=True):
            done[rows.index[row]] = Generated(rows.index[row], text.strip(), rows.ids[row], finished)
        free = deque(row for row, _ in ended)
        with evaluating(model):
            while free and (injection := waiting.take(len(free))) is not None:
                taken = [free.popleft() for _ in range(injection.batch_size)]
                rows.start(taken, injection, started)
                started += len(taken)
            if free:
                rows.keep([row for row in range(rows.size) if row not in free])
        while emitted in done:
            yield done.pop(emitted)
            emitted += 1
