"""Latents that wait to be decoded: checked, in blocks of one size however they come, and projected when rows are free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lmvae_fast.errors import LatentError
from lmvae_fast.generation.decode_rows import Rows, Start
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAE

#: Latents ``[n, latent_dim]`` on the model's device, and what goes with them into ``model.inject``, by name.
Block = tuple[Tensor, dict[str, Tensor]]


#: One prompt for all latents, or one for each: as text, or as the ids that are read before a sentence is written.
Prompts = str | Sequence[str] | Sequence[Sequence[int]]


class Prompt(NamedTuple):
    """What is read before a sentence is written, one id at least, and the ids of it that its text begins with."""

    read: tuple[int, ...]
    shown: tuple[int, ...]


def blocks_of(
    model: LMVAE,
    latents: Tensor | Iterable[Tensor],
    annotations: Tensor | None,
    size: int,
    beside: Mapping[str, Tensor] | None = None,
) -> Iterator[Block]:
    """Checked latents in blocks of ``size``, the last one shorter, in whatever pieces they come.

    A tensor is checked whole before the first block is given out. Of an iterable no more is read than the next block
    takes. beside: further tensors for ``model.inject``, a row for each latent.

    Raises:
        LatentError: latents of another width or dtype, or with NaN or Inf; labels or what is beside of another number or
            width, or beside an iterable.
    """
    given = dict(beside or {})
    if annotations is not None:
        given["annotations"] = annotations
    if not isinstance(latents, Tensor):
        if given:
            raise LatentError(f"{next(iter(given))} need the latents as one tensor", value=type(latents).__name__)
        return ((block, {}) for block in _regrouped(model, latents, size))
    model.check_latents(latents)
    if annotations is not None:
        width = len(model.config.annotations) if model.config.conditional_decoder else annotations.shape[-1]
        if annotations.shape != (latents.shape[0], width):
            limit = [latents.shape[0], width]
            raise LatentError("pooled labels do not fit the latents", value=list(annotations.shape), limit=limit)
    for name, tensor in given.items():
        if tensor.shape[0] != latents.shape[0]:
            raise LatentError(
                f"{name} do not fit the latents", value=list(tensor.shape), limit=f"{latents.shape[0]} rows"
            )
    return (
        (
            z.to(model.device, model.latent_dtype),
            {name: tensor[start : start + size].to(model.device) for name, tensor in given.items()},
        )
        for start, z in zip(range(0, len(latents), size), latents.split(size), strict=False)
    )


def _regrouped(model: LMVAE, blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    gathered: list[Tensor] = []
    for block in blocks:
        model.check_latents(block)
        gathered.append(block.to(model.device, model.latent_dtype))
        if sum(map(len, gathered)) >= size:
            parts = torch.cat(gathered).split(size)
            whole = [part for part in parts if len(part) == size]
            gathered = list(parts[len(whole) :])
            yield from whole
    if sum(map(len, gathered)):
        yield torch.cat(gathered)


class Waiting:
    """Sentences to come, in order. One block is looked at at a time: one projection reads every weight of the projector,
    whatever its batch.

    Args:
        model: any LMVAE.
        blocks: of latents.
        tokens: the most tokens that any sentence will read.
        prompts: what sentences begin with: none, one for all, or one per latent.
        samples: sentences of each latent.
        first_index: index of the first latent.
        numbers: see ``generate``.
    """

    def __init__(
        self,
        model: LMVAE,
        blocks: Iterator[Block],
        *,
        tokens: int,
        prompts: list[Prompt],
        samples: int,
        first_index: int,
        numbers: Sequence[int] | None,
    ):
        self.model, self.blocks, self.tokens, self.samples = model, blocks, tokens, samples
        self.prompts, self.numbers = prompts, numbers
        self.first_index = self.block_start = first_index
        self.block: Block | None = None
        self.injection: Injection | None = None  # of the block, once some of its sentences have started and others wait
        self.next = 0  # sentence of the block: sample s of its latent r is number r * samples + s

    def ready(self) -> int:
        """Sentences of the block that wait; the next block's if there are none, 0 when no latent is left."""
        if self.block is None or self.next == len(self.block[0]) * self.samples:
            self.block_start += 0 if self.block is None else len(self.block[0])
            self.block, self.injection, self.next = next(self.blocks, None), None, 0
        return 0 if self.block is None else len(self.block[0]) * self.samples - self.next

    def kind(self) -> Injection:
        """An injection of no latents, like those that will come; some sentence must be ready."""
        assert self.block is not None
        z, given = self.block
        return self.model.inject(z[:0], tokens=self.tokens, **{name: tensor[:0] for name, tensor in given.items()})

    def fill(self, rows: Rows) -> None:
        """Start sentences in the rows that are free, as long as there are some."""
        free = [row for row, start in enumerate(rows.starts) if start is None]
        while free and (count := min(len(free), self.ready())):
            self._start(rows, free[:count])
            free = free[count:]

    def _start(self, rows: Rows, where: list[int]) -> None:
        assert self.block is not None
        z, given = self.block
        numbers = range(self.next, self.next + len(where))
        self.next += len(where)
        starts = [self._describe(number) for number in numbers]
        if self.samples == 1 and len(where) == len(z) and _neighbours(where):
            # The whole block, into rows that lie side by side: no second tensor for its memory.
            room = rows.room(where[0], len(where))
            rows.start(where, self.model.inject(z, tokens=self.tokens, out=room, **given), starts, placed=True)
            return
        if self.injection is None:
            self.injection = self.model.inject(z, tokens=self.tokens, **given)
        if self.samples == 1:
            injection = self.injection.select(slice(numbers.start, numbers.stop))
        else:
            latents = torch.tensor([number // self.samples for number in numbers], device=z.device)
            injection = self.injection.select(latents)
        rows.start(where, injection, starts)

    def _describe(self, number: int) -> Start:
        latent, sample = divmod(number, self.samples)
        index = self.block_start + latent
        each = len(self.prompts) > 1
        prompt = self.prompts[index - self.first_index if each else 0] if self.prompts else Prompt((), ())
        draw = index if self.numbers is None else int(self.numbers[index - self.first_index])
        return Start(index, sample, draw * self.samples + sample, prompt.shown, prompt.read)


def _neighbours(rows: list[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(rows))
