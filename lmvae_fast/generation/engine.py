"""The decode engine: any number of latents to text, in batches over one static cache.

A row whose sentence has ended takes the next latent at once, so the batch stays full. `waiting.py` holds what is to come,
`rows.py` what is being decoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.generation.beams import search
from lmvae_fast.generation.cuda_graphs import capture_for
from lmvae_fast.generation.decode_rows import Ended, Rows
from lmvae_fast.generation.queue import Block, Prompt, Prompts, Waiting, blocks_of
from lmvae_fast.generation.spelling import responses, spelled
from lmvae_fast.memory import check_memory
from lmvae_fast.models.decoder.prepared_weights import check_weights, packed_weights
from lmvae_fast.models.inputs import beginnings
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.modes import evaluating

logger = logging.getLogger(__name__)

#: Steps between two looks at which sentences have ended, by device: on a CPU looking is free.
STEPS_PER_LOOK = {"cpu": 1}
_STEPS_PER_LOOK_ELSEWHERE = 8


@dataclass(frozen=True)
class Generated:
    """One decoded sentence.

    ``index``: row of its latent in the input; ``sample``: its number among that latent's samples; ``text``, prompt
    included (of a model of prompts: the response alone, up to its first special token); ``ids``: the tokens produced,
    without prompt and end token; ``finished``: ended by an end or stop token; ``logprobs``: natural logarithm of each
    produced token's probability, where asked for; ``response``, of a model of prompts: all of the response as its tokens
    spell it behind the prompt, outer spaces and stop token included.
    """

    index: int
    text: str
    ids: list[int]
    finished: bool
    sample: int = 0
    logprobs: list[float] | None = None
    response: str | None = None


def generate(
    model: LMVAE,
    latents: Tensor | Iterable[Tensor],
    config: GenerationConfig | None = None,
    *,
    annotations: Tensor | None = None,
    prompts: Prompts | None = None,
    first_index: int = 0,
    numbers: Sequence[int] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Iterator[Generated]:
    """Decode latents, in their order.

    Args:
        model: any LMVAE.
        latents: ``[N, latent_dim]``, or an iterable of such blocks of any size, of which no more are read at a time than
            fill a batch.
        config: how; greedy by default.
        annotations: pooled labels ``[N, labels]`` of a conditional decoder (``latents`` must then be one tensor).
        prompts: text that every sentence, or the sentence of each latent, begins with (of a model of prompts: which it
            answers); or, one per latent, the ids that are read before it, start token included.
        first_index: index of the first latent: what a resumed stream continues from.
        numbers: of each latent (``latents`` must then be one tensor), where its draw is to go by another number than its
            index: the rows of a dataset that comes in pieces of any order.
        beside: further latents for ``model.inject``, a row for each (``latents`` must then be one tensor): ``shift_z`` for
            the embedding, ``residual_z`` for the output residual.

    Raises:
        LatentError: latents of another width or dtype, or with NaN or Inf; none of that batch is decoded then.
        ConfigError: more tokens asked for than the model's memory or positions allow, or a prompt that leaves none; a
            stop token beyond the vocabulary; CUDA graphs, or weights in int8, asked for on another device.
        DataError: prompts, or numbers, and latents of different number.
        NumericalError: weights of the head that are NaN or Inf; and, when its sentence ends, a latent whose decoding was.
    """
    config = config or GenerationConfig()
    model.decoder.check_head()
    check_weights(model.decoder, config.weights)
    given = _prompts(model, latents, prompts)
    longest = max((len(prompt.read) - 1 for prompt in given), default=0)
    limit = token_limit(model, config, longest)
    capture_for(model.decoder, model.device, config.cuda_graphs)  # raises where what is asked for cannot be
    if config.num_beams > 1:
        check_memory(f"{config.num_beams:,} beams", "lower num_beams", 8 * config.num_beams * model.decoder.vocab_size)
        blocks = blocks_of(model, latents, annotations, max(1, config.batch_size // config.num_beams), beside)
        return _beams(model, blocks, given, config, limit, first_index)
    blocks = blocks_of(model, latents, annotations, -(-config.batch_size // config.num_samples), beside)
    seed = None
    if config.do_sample:
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    if numbers is not None and (not isinstance(latents, Tensor) or len(numbers) != latents.shape[0]):
        value = len(latents) if isinstance(latents, Tensor) else type(latents).__name__
        raise DataError("numbers are one per latent of one tensor", value=value, limit=len(numbers))
    waiting = Waiting(
        model,
        blocks,
        tokens=longest + limit,
        prompts=given,
        samples=config.num_samples,
        first_index=first_index,
        numbers=numbers,
    )
    return _run(model, waiting, config, {"limit": limit, "longest_prompt": longest, "config": config, "seed": seed})


def decode(
    model: LMVAE,
    z: Tensor,
    config: GenerationConfig,
    *,
    annotations: Tensor | None = None,
    prompts: Prompts | None = None,
) -> list[str]:
    """Text of latents ``[batch, latent_dim]``, or of one ``[latent_dim]``; raises what :func:`generate` raises."""
    if isinstance(z, Tensor) and z.dim() == 1:
        z = z.unsqueeze(0)
    model.check_latents(z, finite=False)  # generate takes iterables too, this does not
    return [out.text for out in generate(model, z, config, annotations=annotations, prompts=prompts)]


def token_limit(model: LMVAE, config: GenerationConfig, prompt_tokens: int = 0) -> int:
    """Tokens a sentence may have under this configuration, its prompt not counted; ConfigError past what the model allows."""
    slots, length = int(model.config.slots or 0), model.config.max_len
    wide = [token for token in config.stop_tokens if token >= model.decoder.vocab_size]
    if wide:
        raise ConfigError("a stop token is not in the vocabulary", value=wide[0], limit=f"< {model.decoder.vocab_size}")
    left = length if model.config.prompted else length - prompt_tokens
    limit = left if config.max_new_tokens is None else config.max_new_tokens
    if limit < 1:
        raise ConfigError(
            "the prompt leaves no token to produce",
            value=f"{prompt_tokens} tokens",
            limit=f"max_len={length}",
            remedy="shorten it, or give max_new_tokens where the visibility allows more than max_len tokens",
        )
    if model.config.visibility != "prefix" and prompt_tokens + limit > length:
        prompt = f" behind a prompt of {prompt_tokens}" if prompt_tokens else ""
        raise ConfigError(
            f"{model.config.visibility} visibility has a memory slot for each of max_len tokens and no more",
            value=f"max_new_tokens={limit}{prompt}",
            limit=f"max_len={length}",
            remedy="ask for fewer tokens",
        )
    model.decoder.check_positions(slots, prompt_tokens + limit, str(model.config.visibility))
    return limit


def _prompts(model: LMVAE, latents: Tensor | Iterable[Tensor], prompts: Prompts | None) -> list[Prompt]:
    """The prompts: none, one for all, or one per latent. A sentence begins with its prompt; a response does not."""
    if prompts is None and not model.config.prompted:
        return []
    if prompts is None:
        logger.warning("no prompts were given to a model of prompts: every latent answers the empty one (prompts=)")
    if prompts is None or isinstance(prompts, str):
        prompts = [prompts or ""]
    elif not isinstance(latents, Tensor) or len(prompts) != latents.shape[0]:
        value = len(latents) if isinstance(latents, Tensor) else type(latents).__name__
        raise DataError(
            "one prompt per latent needs the latents as one tensor of as many rows",
            value=value,
            limit=len(prompts),
            remedy="or give one string for all",
        )
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    given: Any = prompts
    read = beginnings(texts, model.config, model.decoder) if texts else [tuple(ids) for ids in given]
    return [Prompt(ids, () if model.config.prompted else ids[1:]) for ids in read]


def _run(model: LMVAE, waiting: Waiting, config: GenerationConfig, options: dict) -> Iterator[Generated]:
    with evaluating(model):  # never held while a consumer has control
        size = min(waiting.ready(), config.batch_size)
        if size == 0:
            return
        rows = Rows.ready(model, waiting.kind(), size, **options)
        waiting.fill(rows)
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
        for out in _texts(model, rows.take(ended)):
            done[out.index, out.sample] = out
        with evaluating(model):
            waiting.fill(rows)
            rows.shrink()
        while emitted in done:
            yield done.pop(emitted)
            index, sample = emitted
            emitted = (index, sample + 1) if sample + 1 < config.num_samples else (index + 1, 0)
    rows.leave()


def _beams(
    model: LMVAE, blocks: Iterator[Block], prompts: list[Prompt], config: GenerationConfig, limit: int, index: int
) -> Iterator[Generated]:
    place = 0
    longest = max((len(prompt.read) - 1 for prompt in prompts), default=0)
    for z, given in blocks:
        rows = range(place, place + len(z))
        chosen = [prompts[row if len(prompts) > 1 else 0] for row in rows] if prompts else []
        with (
            evaluating(model),
            packed_weights(model.decoder, len(z) * config.num_beams, config.pack_weights, config.weights),
        ):
            injection = model.inject(z, tokens=limit + longest, **given)
            shown, read_first = [prompt.shown for prompt in chosen], [prompt.read for prompt in chosen]
            best = search(
                model.decoder, injection, shown, config, limit, first_index=index + place, read_first=read_first
            )
        texts = spelled(
            model, [(prompt, found.ids) for prompt, found in zip(shown or [()] * len(best), best, strict=True)]
        )
        answered = [
            (ids, found.ids, found.end) for ids, found in zip(read_first or [()] * len(best), best, strict=True)
        ]
        for row, (found, text, answer) in enumerate(zip(best, texts, responses(model, answered), strict=True)):
            yield Generated(index + place + row, text, found.ids, found.end is not None, response=answer)
        place += len(best)


def _texts(model: LMVAE, ended: list[Ended]) -> list[Generated]:
    texts = spelled(model, [(out.start.prompt, out.ids) for out in ended])
    answers = responses(model, [(out.start.read, out.ids, out.end) for out in ended])
    return [
        Generated(out.start.index, text, out.ids, out.end is not None, out.start.sample, out.logprobs, answer)
        for out, text, answer in zip(ended, texts, answers, strict=True)
    ]
