"""The decode engine: any number of latents to text, in batches over one static cache.

A row whose sentence has ended takes the next latent at once, so the batch stays full; memory is projected for a whole
batch of waiting latents at a time, because one projection reads every weight of the projector whatever its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.generation.beams import search
from lmvae_fast.generation.rows import Rows, Start
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.packed import packed_weights

#: Steps between two looks at which sentences have ended, by device: on a CPU looking is free.
STEPS_PER_LOOK = {"cpu": 1}
_STEPS_PER_LOOK_ELSEWHERE = 8


@dataclass(frozen=True)
class Generated:
    """One decoded sentence.

    ``index``: row of its latent in the input; ``sample``: its number among that latent's samples; ``text``, prompt
    included; ``ids``: the tokens produced, without prompt and end token; ``finished``: ended by an end or stop token;
    ``logprobs``: natural logarithm of each produced token's probability, where asked for.
    """

    index: int
    text: str
    ids: list[int]
    finished: bool
    sample: int = 0
    logprobs: list[float] | None = None


def generate(
    model: LMVAE,
    latents: Tensor | Iterable[Tensor],
    config: GenerationConfig | None = None,
    *,
    annotations: Tensor | None = None,
    prompts: str | Sequence[str] | None = None,
    first_index: int = 0,
    numbers: Sequence[int] | None = None,
) -> Iterator[Generated]:
    """Decode latents, in their order.

    Args:
        model: any LMVAE.
        latents: ``[N, latent_dim]``, or an iterable of such blocks (read one at a time).
        config: how; greedy by default.
        annotations: pooled labels ``[N, labels]`` of a conditional decoder (``latents`` must then be one tensor).
        prompts: text that every sentence, or the sentence of each latent, begins with.
        first_index: index of the first latent: what a resumed stream continues from.
        numbers: of each latent (``latents`` must then be one tensor), where its draw is to go by another number than its
            index: the rows of a dataset that comes in pieces of any order.

    Raises:
        LatentError: latents of another width or dtype, or with NaN or Inf; none of that block is decoded then.
        ConfigError: more tokens asked for than the model's memory or positions allow, or a prompt that leaves none; a
            stop token beyond the vocabulary.
        DataError: prompts, or numbers, and latents of different number.
    """
    config = config or GenerationConfig()
    ids = _prompt_ids(model, latents, prompts)
    longest = max(map(len, ids), default=0)
    limit = token_limit(model, config, longest)
    if config.num_beams > 1:
        if len(set(map(len, ids))) > 1:
            raise ConfigError(
                "beam search reads one prompt length for all sentences", value=sorted(set(map(len, ids))),
                remedy="group the latents by the length of their prompts",
            )  # fmt: skip
        blocks = _blocks(model, latents, annotations, max(1, config.batch_size // config.num_beams))
        return _beams(model, blocks, ids, config, limit, first_index)
    blocks = _blocks(model, latents, annotations, config.batch_size)
    seed = None
    if config.do_sample:
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    if numbers is not None and (not isinstance(latents, Tensor) or len(numbers) != latents.shape[0]):
        value = len(latents) if isinstance(latents, Tensor) else type(latents).__name__
        raise DataError("numbers are one per latent of one tensor", value=value, limit=len(numbers))
    waiting = _Waiting(model, blocks, ids, config.num_samples, first_index, numbers)
    return _run(model, waiting, config, {"limit": limit, "longest_prompt": longest, "config": config, "seed": seed})


def token_limit(model: LMVAE, config: GenerationConfig, prompt_tokens: int = 0) -> int:
    """Tokens a sentence may have under this configuration, its prompt not counted; ConfigError past what the model allows."""
    slots, length = int(model.config.slots or 0), model.config.max_len
    wide = [token for token in config.stop_tokens if token >= model.decoder.vocab_size]
    if wide:
        raise ConfigError("a stop token is not in the vocabulary", value=wide[0], limit=f"< {model.decoder.vocab_size}")
    limit = length - prompt_tokens if config.max_new_tokens is None else config.max_new_tokens
    if limit < 1:
        raise ConfigError(
            "the prompt leaves no token to produce", value=f"{prompt_tokens} tokens", limit=f"max_len={length}",
            remedy="shorten it, or give max_new_tokens where the visibility allows more than max_len tokens",
        )  # fmt: skip
    if model.config.visibility != "prefix" and prompt_tokens + limit > length:
        prompt = f" behind a prompt of {prompt_tokens}" if prompt_tokens else ""
        raise ConfigError(
            f"{model.config.visibility} visibility has a memory slot for each of max_len tokens and no more",
            value=f"max_new_tokens={limit}{prompt}", limit=f"max_len={length}", remedy="ask for fewer tokens",
        )  # fmt: skip
    model.decoder.check_positions(slots, prompt_tokens + limit, str(model.config.visibility))
    return limit


def _prompt_ids(model: LMVAE, latents, prompts: str | Sequence[str] | None) -> list[tuple[int, ...]]:
    """Ids of the prompts: none, one for all, or one per latent."""
    if prompts is None:
        return []
    if isinstance(prompts, str):
        return [tuple(model.decoder.tokenizer.encode([prompts])[0])]
    if not isinstance(latents, Tensor) or len(prompts) != latents.shape[0]:
        value = len(latents) if isinstance(latents, Tensor) else type(latents).__name__
        raise DataError(
            "one prompt per latent needs the latents as one tensor of as many rows", value=value, limit=len(prompts),
            remedy="or give one string for all",
        )  # fmt: skip
    return [tuple(ids) for ids in model.decoder.tokenizer.encode(prompts)]


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
    """Latents projected but not started: one block at a time, handed out sentence by sentence."""

    def __init__(
        self, model: LMVAE, blocks, prompts: list[tuple[int, ...]], samples: int, first_index: int,
        numbers: Sequence[int] | None,
    ):  # fmt: skip
        self.model, self.blocks, self.prompts, self.samples, self.numbers = model, blocks, prompts, samples, numbers
        self.block: Injection | None = None
        self.first_index = self.block_start = first_index
        self.next = 0  # sentence of the block: sample s of its latent r is number r * samples + s

    def take(self, count: int) -> tuple[Injection, list[Start]] | None:
        """Up to ``count`` sentences; None when there is nothing left."""
        if self.block is None or self.next == self.block.batch_size * self.samples:
            self.block_start += 0 if self.block is None else self.block.batch_size
            z, labels = next(self.blocks, (None, None))
            if z is None:
                return None
            weight = self.model.posterior_head.weight
            z = z.to(device=weight.device, dtype=weight.dtype)
            self.block, self.next = self.model.inject(z, None if labels is None else labels.to(weight.device)), 0
        begin, self.next = self.next, min(self.next + count, self.block.batch_size * self.samples)
        numbers = range(begin, self.next)
        starts = [self._start(number) for number in numbers]
        if self.samples == 1:
            return self.block.select(slice(begin, self.next)), starts
        rows = torch.tensor([number // self.samples for number in numbers], device=self.model.device)
        return self.block.select(rows), starts

    def _start(self, number: int) -> Start:
        index = self.block_start + number // self.samples
        each = len(self.prompts) > 1
        prompt = self.prompts[index - self.first_index if each else 0] if self.prompts else ()
        latent = index if self.numbers is None else int(self.numbers[index - self.first_index])
        return Start(index, number % self.samples, latent * self.samples + number % self.samples, prompt)


def _run(model: LMVAE, waiting: _Waiting, config: GenerationConfig, options: dict) -> Iterator[Generated]:
    with evaluating(model):  # never held while a consumer has control
        first = waiting.take(config.batch_size)
        if first is None:
            return
        rows = Rows(model, first[0], **options)
        rows.start(list(range(rows.size)), *first)
    steps = STEPS_PER_LOOK.get(model.device.type, _STEPS_PER_LOOK_ELSEWHERE)
    emitted = (waiting.first_index, 0)
    done: dict[tuple[int, int], Generated] = {}
    while any(start is not None for start in rows.starts):
        with evaluating(model):
            for _ in range(steps):
                rows.advance()
            ended = rows.ended()
        if not ended:
            continue
        for out in _read(model, rows, ended):
            done[out.index, out.sample] = out
        free = [row for row, start in enumerate(rows.starts) if start is None]
        with evaluating(model):
            while free and (more := waiting.take(len(free))) is not None:
                rows.start(free[: len(more[1])], *more)
                free = free[len(more[1]) :]
            # the cache is copied to shrink, so a few idle rows are let be
            if 4 * len(free) >= rows.size:
                rows.keep([row for row in range(rows.size) if rows.starts[row] is not None])
        while emitted in done:
            yield done.pop(emitted)
            index, sample = emitted
            emitted = (index, sample + 1) if sample + 1 < config.num_samples else (index + 1, 0)


def _beams(model: LMVAE, blocks, prompts, config: GenerationConfig, limit: int, index: int) -> Iterator[Generated]:
    place = 0
    for z, labels in blocks:
        chosen = [prompts[row if len(prompts) > 1 else 0] for row in range(place, place + len(z))] if prompts else []
        with evaluating(model), packed_weights(model.decoder, len(z) * config.num_beams, config.pack_weights):
            weight = model.posterior_head.weight
            z = z.to(device=weight.device, dtype=weight.dtype)
            injection = model.inject(z, None if labels is None else labels.to(weight.device))
            best = search(model.decoder, injection, chosen, config, limit)
        texts = model.decoder.tokenizer.decode(
            [[*(chosen[row] if chosen else ()), *found.ids] for row, found in enumerate(best)]
        )
        for row, (found, text) in enumerate(zip(best, texts, strict=True)):
            yield Generated(index + place + row, text.strip(), found.ids, found.finished)
        place += len(best)


def _read(model: LMVAE, rows: Rows, ended: list[int]) -> list[Generated]:
    taken = [rows.take(row) for row in ended]
    texts = model.decoder.tokenizer.decode([[*start.prompt, *ids] for start, ids, _, _ in taken])
    return [
        Generated(start.index, text.strip(), ids, stopped, start.sample, logprobs)
        for (start, ids, logprobs, stopped), text in zip(taken, texts, strict=True)
    ]
