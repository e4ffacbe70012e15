"""The sentences being decoded: one cache row each, everything about them on the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import NumericalError
from lmvae_fast.generation.cuda_graphs import keep, kept, kind_of, rows_of
from lmvae_fast.kernels import philox
from lmvae_fast.kernels.sample_token import sample_token
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.prefill import read
from lmvae_fast.models.decoder.prepared_weights import exchanges
from lmvae_fast.models.decoder.recorded_step import RecordedStep, capture_for
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAE


@dataclass(frozen=True)
class Start:
    """A sentence about to begin: row of its latent, number among that latent's samples, number that its draw goes by, and
    ids its text begins with.

    read: ids that are read before it is written, one at least, where they are not the start token and ``prompt``.
    """

    index: int
    sample: int
    draw: int
    prompt: tuple[int, ...] = ()
    read: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A sentence that has ended: how it began, its ids, their log-probabilities where asked for, and the end or stop token
    that ended it, or None."""

    start: Start
    ids: list[int]
    logprobs: list[float] | None
    end: int | None


def check_finite(finite: bool, index: int) -> None:
    """Raises NumericalError for a sentence whose hidden states or logits were NaN or infinite; ``index``: of its latent."""
    if not finite:
        raise NumericalError(
            "decoding gave hidden states or logits that are NaN or infinite",
            value=f"the sentence of latent {index}",
            limit="finite figures",
            remedy="check that latent (a huge one overflows) and the model's weights; or decode in float32",
        )


class Rows:
    """Up to ``size`` sentences at a time, each at a step of its own.

    Args:
        model: any LMVAE.
        kind: an injection, of no latents, like those that the rows will hold.
        size: rows.
        limit: the most tokens a sentence may have beside its prompt.
        longest_prompt: the most ids that are read before a sentence is written, one of them not counted.
        config: how tokens are chosen.
        seed: of the draw.

    A row that has ended reads on without effect until it is given another sentence: so nothing has to be known on the
    host at every step.
    """

    def __init__(
        self,
        model: LMVAE,
        kind: Injection,
        size: int,
        *,
        limit: int,
        longest_prompt: int,
        config: GenerationConfig,
        seed: int | None,
    ):
        self.model, self.config, self.limit, self.size = model, config, limit, size
        self.key: Hashable | None = None  # that other calls find the rows by
        decoder, device = model.decoder, model.decoder.device
        self.cache: LatentCache = decoder.new_cache(kind, batch=size, max_tokens=longest_prompt + limit)
        # What is not memory is kept per row and overwritten when a row starts a new sentence.
        parts = (kind.embedding_shift, kind.output_residual)
        self.injection = Injection(
            kind.visibility,
            None if kind.memory is None else self.cache.memory,
            *(None if part is None else part.new_zeros(size, part.shape[1]) for part in parts),
        )
        self.seed = philox.seed_tensor(0 if seed is None else seed, device)
        self.stops = torch.tensor([decoder.tokenizer.eos_token_id, *config.stop_tokens], device=device)
        # One column beyond the limit takes what rows without effect write.
        self.state: dict[str, Tensor] = {
            "token": torch.zeros(size, dtype=torch.int64, device=device),
            "count": torch.zeros(size, dtype=torch.int64, device=device),
            "sentence": torch.zeros(size, dtype=torch.int64, device=device),
            "done": torch.ones(size, dtype=torch.bool, device=device),
            "stopped": torch.zeros(size, dtype=torch.bool, device=device),
            "ids": torch.zeros(size, limit + 1, dtype=torch.int64, device=device),
        }
        if config.logprobs:
            self.state["logprobs"] = torch.zeros(size, limit + 1, dtype=torch.float32, device=device)
        if config.repetition_penalty != 1.0:
            self.state["seen"] = torch.zeros(size, decoder.vocab_size, dtype=torch.uint8, device=device)
        self.starts: list[Start | None] = [None] * size  # None: a row without a sentence
        self.packed = exchanges(decoder, size, config.pack_weights, config.weights)
        self.recorded = self._recording()

    @classmethod
    def ready(cls, model: LMVAE, kind: Injection, size: int, *, seed: int | None, **options: Any) -> Rows:
        """Rows as the constructor makes them: those that an earlier call of the same kind left with its recording, if any."""
        decoder, config = model.decoder, options["config"]
        if capture_for(decoder, decoder.device, config.cuda_graphs) is None:
            return cls(model, kind, size, seed=seed, **options)
        key = kind_of(decoder, kind, size, end_token=decoder.tokenizer.eos_token_id, **options)
        rows = kept(decoder, key)
        now = exchanges(decoder, size, config.pack_weights, config.weights)
        if rows is None or (rows.packed is not now and (rows.packed or now)):  # recorded over layers that are no more
            rows = cls(model, kind, size, seed=seed, **options)
        else:
            rows.seed.copy_(philox.seed_tensor(0 if seed is None else seed, decoder.device))
            rows._serve(model)
        rows.key = key
        return rows

    def leave(self) -> None:
        """When all sentences have ended: keep the rows for another call, where they have a recording and their first size."""
        decoder, key = self.model.decoder, self.key
        if key is not None and self.recorded is not None and not (self.packed and decoder.device.type == "cpu"):
            self._serve(None)  # what is kept for a decoder must not keep it alive
            keep(decoder, key, self)

    def _serve(self, model: LMVAE | None) -> None:
        self.__dict__["model"] = model
        if self.recorded is not None:
            self.recorded.decoder = None if model is None else model.decoder

    def room(self, first: int, count: int) -> Tensor | None:
        """The memory slots of some rows that lie side by side, for a projector to write; None without memory."""
        return None if self.injection.memory is None else self.cache.memory[:, :, first : first + count]

    def start(self, rows: list[int], injection: Injection, starts: list[Start], *, placed: bool = False) -> None:
        """Begin new sentences in these rows. placed: their memory was written into :meth:`room`."""
        device, state = self.cache.step.device, self.state
        where = torch.tensor(rows, dtype=torch.int64, device=device)
        if placed:
            self.cache.restart(where)
        else:
            self.cache.place(where, injection)
        for name in ("embedding_shift", "output_residual"):
            if (part := getattr(injection, name)) is not None:
                getattr(self.injection, name).index_copy_(0, where, part)
        for name in ("count", "done", "stopped", "seen"):
            if name in state:
                state[name].index_fill_(0, where, 0)
        state["sentence"].index_copy_(0, where, torch.tensor([start.draw for start in starts], device=device))
        # All that a sentence begins with but the last token is read at once; the first step reads that one.
        begins = [start.read or (self.model.decoder.tokenizer.bos_token_id, *start.prompt) for start in starts]
        state["token"].index_copy_(0, where, torch.tensor([ids[-1] for ids in begins], device=device))
        if any(len(ids) > 1 for ids in begins):
            with exchanged(self.packed):
                self._read(rows, injection, starts, [ids[:-1] for ids in begins])
            if "seen" in state:
                pairs = [(row, token) for row, ids in zip(rows, begins, strict=True) for token in ids[1:]]
                state["seen"][torch.tensor(pairs, device=device).unbind(1)] = 1
        for row, start in zip(rows, starts, strict=True):
            self.starts[row] = start

    def _read(self, rows: list[int], injection: Injection, starts: list[Start], begins: list[tuple[int, ...]]) -> None:
        """Read the beginnings of new sentences; those of one latent that are the same, once for all its rows."""
        first: dict[tuple[int, tuple[int, ...]], int] = {}
        source = [
            first.setdefault((start.index, ids), place)
            for place, (start, ids) in enumerate(zip(starts, begins, strict=True))
        ]
        read_for = sorted(first.values())
        if len(read_for) == len(rows):
            read(self.model.decoder, self.cache, injection, rows, begins)
            return
        chosen = injection.select(torch.tensor(read_for, device=self.cache.step.device))
        read(self.model.decoder, self.cache, chosen, [rows[p] for p in read_for], [begins[p] for p in read_for])
        copies = [(rows[place], rows[of]) for place, of in enumerate(source) if place != of]
        to, of = torch.tensor(copies, device=self.cache.step.device).unbind(1)
        self.cache.copy_tokens(to, of, max(map(len, begins)))

    def advance(self) -> None:
        """One token further in every row; nothing is copied to the host."""
        step = self.recorded or self._advance
        step()

    def _advance(self) -> None:
        state = self.state
        token, logprob = self._choose()
        own = ~state["done"]
        ending = own & (token.unsqueeze(1) == self.stops).any(1)
        place = torch.where(own, state["count"], self.limit).unsqueeze(1)
        state["ids"].scatter_(1, place, token.unsqueeze(1))
        if logprob is not None:
            state["logprobs"].scatter_(1, place, logprob.unsqueeze(1))
        if "seen" in state:
            state["seen"].scatter_(1, token.unsqueeze(1), 1)
        state["count"] += own & ~ending
        state["stopped"] |= ending
        state["done"] |= ending | (state["count"] >= self.limit)
        state["token"].copy_(token)

    def _choose(self) -> tuple[Tensor, Tensor | None]:
        """The next token of every row, int64 ``[size]``, and its log-probability where asked for."""
        state, config, decoder = self.state, self.config, self.model.decoder
        with exchanged(self.packed):
            plain = not (config.do_sample or config.logprobs or config.min_new_tokens)
            if plain and "seen" not in state:  # no logit is wanted
                head = config.pack_weights and config.weights is None  # another head is among what is exchanged
                return decoder.greedy_step(state["token"], self.cache, self.injection, head), None
            logits = decoder.step(state["token"], self.cache, self.injection)
        if config.min_new_tokens:
            early = (state["count"] < config.min_new_tokens).unsqueeze(1)
            logits[:, self.stops] = torch.where(early, -torch.inf, logits[:, self.stops])
        options = (
            {}
            if not config.do_sample
            else {
                "temperature": config.temperature,
                "top_k": config.top_k,
                "top_p": config.top_p,
                "min_p": config.min_p,
                "seed": self.seed,
                "rows": state["sentence"],
                "steps": state["count"],
            }
        )
        chosen = sample_token(
            logits,
            greedy=not config.do_sample,
            seen=state.get("seen"),
            logprob=config.logprobs,
            repetition_penalty=config.repetition_penalty,
            **options,
        )
        return chosen if config.logprobs else (chosen, None)

    def ended(self) -> list[int]:
        """Rows whose sentence has ended and was not taken yet. The one place where the host waits for the device."""
        return [row for row, done in enumerate(self.state["done"].tolist()) if done and self.starts[row] is not None]

    def take(self, rows: list[int]) -> list[Ended]:
        """Take ended sentences out of their rows."""
        where = torch.tensor(rows, dtype=torch.int64, device=self.cache.step.device)
        for row, finite in zip(rows, self.cache.finite[where].tolist(), strict=True):
            start = self.starts[row]
            assert start is not None
            check_finite(finite, start.index)
        count, stopped, ids = (self.state[name][where].tolist() for name in ("count", "stopped", "ids"))
        logprobs = self.state["logprobs"][where].tolist() if "logprobs" in self.state else None
        taken = []
        for place, row in enumerate(rows):
            start, self.starts[row] = self.starts[row], None
            assert start is not None
            own = None if logprobs is None else logprobs[place][: count[place]]
            length = count[place]
            # what ended the sentence stands behind its own tokens
            taken.append(Ended(start, ids[place][:length], own, ids[place][length] if stopped[place] else None))
        return taken

    def shrink(self) -> None:
        """Drop rows without a sentence, where that makes the batch at least a quarter smaller: the cache is copied for it."""
        live = [row for row, start in enumerate(self.starts) if start is not None]
        size = len(live) if self.recorded is None else rows_of(len(live))
        if live and 4 * (self.size - size) >= self.size:
            idle = [row for row, start in enumerate(self.starts) if start is None]
            self._keep((live + idle)[:size])

    def _keep(self, rows: list[int]) -> None:
        where = torch.tensor(rows, dtype=torch.int64, device=self.cache.step.device)
        self.key = self.recorded = None  # it must not outlive the tensors it was recorded over
        self.packed = []  # nor should weights in the layout of other sizes, where the new size has another
        self.cache.select(where)
        parts = (self.injection.embedding_shift, self.injection.output_residual)
        self.injection = Injection(
            self.injection.visibility,
            None if self.injection.memory is None else self.cache.memory,
            *(None if part is None else part[where] for part in parts),
        )
        self.state = {name: value[where] for name, value in self.state.items()}
        self.starts = [self.starts[row] for row in rows]
        self.size = len(rows)
        self.packed = exchanges(self.model.decoder, self.size, self.config.pack_weights, self.config.weights)
        self.recorded = self._recording()

    def _recording(self) -> RecordedStep | None:
        """What records steps over the tensors as they are now, where that can be and is wanted."""
        decoder, state = self.model.decoder, [self.cache.step, self.cache.finite, *self.state.values()]
        capture = capture_for(decoder, self.cache.step.device, self.config.cuda_graphs)
        return None if capture is None else RecordedStep(self._advance, state, capture, decoder)
