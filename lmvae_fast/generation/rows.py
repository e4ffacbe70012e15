"""The sentences being decoded: one cache row each, everything about them on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.kernels import philox
from lmvae_fast.kernels.sample_token import sample_token
from lmvae_fast.models.cache import LatentCache
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.packed import packed_weights


@dataclass(frozen=True)
class Start:
    """A sentence about to begin: row of its latent, number among that latent's samples, number that its draw goes by, and
    ids it must begin with."""

    index: int
    sample: int
    draw: int
    prompt: tuple[int, ...] = ()


class Rows:
    """Up to ``first.batch_size`` sentences at a time, each at a step of its own.

    Args:
        model: any LMVAE.
        first: an injection of the kind that the rows will hold.
        limit: the most tokens a sentence may have beside its prompt.
        longest_prompt: the most tokens of a prompt.
        config: how tokens are chosen.
        seed: of the draw.

    A row that has ended reads on without effect until it is given another sentence: so nothing has to be known on the
    host at every step.
    """

    def __init__(
        self, model: LMVAE, first: Injection, *, limit: int, longest_prompt: int, config: GenerationConfig, seed: int | None
    ):
        self.model, self.config, self.limit = model, config, limit
        decoder = model.decoder
        device, size = decoder.device, first.batch_size
        self.size = size
        self.cache: LatentCache = decoder.new_cache(first, batch=size, max_tokens=longest_prompt + limit)
        # What is not memory is kept per row and overwritten when a row starts a new sentence.
        self.injection = Injection(
            first.visibility, None if first.memory is None else self.cache.memory,
            *(None if part is None else part.detach().clone() for part in (first.embedding_shift, first.output_residual)),
        )  # fmt: skip
        self.seed = philox.seed_tensor(0 if seed is None else seed, device)
        self.stops = torch.tensor([decoder.tokenizer.eos_token_id, *config.stop_tokens], device=device)
        # One column beyond the limit takes what rows without effect write.
        self.state: dict[str, Tensor] = {
            "token": torch.empty(size, dtype=torch.int64, device=device),
            "count": torch.zeros(size, dtype=torch.int64, device=device),
            "sentence": torch.zeros(size, dtype=torch.int64, device=device),
            "done": torch.ones(size, dtype=torch.bool, device=device),
            "stopped": torch.zeros(size, dtype=torch.bool, device=device),
            "ids": torch.zeros(size, limit + 1, dtype=torch.int64, device=device),
        }
        if config.logprobs:
            self.state["logprobs"] = torch.zeros(size, limit + 1, device=device)
        if config.repetition_penalty != 1.0:
            self.state["seen"] = torch.zeros(size, decoder.vocab_size, dtype=torch.uint8, device=device)
        if longest_prompt:
            self.state["prompt"] = torch.zeros(size, longest_prompt, dtype=torch.int64, device=device)
            self.state["prompt_length"] = torch.zeros(size, dtype=torch.int64, device=device)
        self.starts: list[Start | None] = [None] * size  # None: a row without a sentence

    def start(self, rows: list[int], injection: Injection, starts: list[Start]) -> None:
        """Begin new sentences in these rows."""
        device, state = self.cache.step.device, self.state
        where = torch.tensor(rows, dtype=torch.int64, device=device)
        self.cache.place(where, injection)
        for name in ("embedding_shift", "output_residual"):
            if (part := getattr(injection, name)) is not None:
                getattr(self.injection, name).index_copy_(0, where, part)
        state["token"].index_fill_(0, where, self.model.decoder.tokenizer.bos_token_id)
        for name in ("count", "done", "stopped", "seen"):
            if name in state:
                state[name].index_fill_(0, where, 0)
        state["sentence"].index_copy_(0, where, torch.tensor([start.draw for start in starts], device=device))
        if "prompt" in state:
            width = state["prompt"].shape[1]
            padded = [[*start.prompt, *[0] * (width - len(start.prompt))] for start in starts]
            state["prompt"].index_copy_(0, where, torch.tensor(padded, device=device))
            lengths = torch.tensor([len(start.prompt) for start in starts], device=device)
            state["prompt_length"].index_copy_(0, where, lengths)
        for row, start in zip(rows, starts, strict=True):
            self.starts[row] = start

    def advance(self) -> None:
        """One token further in every row; nothing is copied to the host."""
        state, config, decoder = self.state, self.config, self.model.decoder
        reading = self.cache.step.clone() if "prompt" in state else None
        with packed_weights(decoder, self.size, config.pack_weights):
            logits = decoder.step(state["token"], self.cache, self.injection)
        options = {} if not config.do_sample else {
            "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p,
            "seed": self.seed, "rows": state["sentence"], "steps": state["count"],
        }  # fmt: skip
        chosen = sample_token(
            logits, greedy=not config.do_sample, seen=state.get("seen"), logprob=config.logprobs,
            repetition_penalty=config.repetition_penalty, **options,
        )  # fmt: skip
        token, logprob = chosen if config.logprobs else (chosen, None)
        own = ~state["done"]
        if reading is not None:
            forced = reading < state["prompt_length"]
            prompt = state["prompt"].gather(1, reading.clamp_max(state["prompt"].shape[1] - 1).unsqueeze(1)).squeeze(1)
            token = torch.where(forced, prompt, token)
            own &= ~forced
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

    def ended(self) -> list[int]:
        """Rows whose sentence has ended and was not taken yet. The one place where the host waits for the device."""
        return [row for row, done in enumerate(self.state["done"].tolist()) if done and self.starts[row] is not None]

    def take(self, row: int) -> tuple[Start, list[int], list[float] | None, bool]:
        """Take an ended sentence out of its row: what it was, its ids, their log-probabilities, whether it was stopped."""
        start, self.starts[row] = self.starts[row], None
        assert start is not None
        count, stopped = int(self.state["count"][row]), bool(self.state["stopped"][row])
        logprobs = self.state["logprobs"][row, :count].tolist() if "logprobs" in self.state else None
        return start, self.state["ids"][row, :count].tolist(), logprobs, stopped

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows: what is left runs in a smaller batch."""
        where = torch.tensor(rows, dtype=torch.int64, device=self.cache.step.device)
        self.cache.select(where)
        parts = (self.injection.embedding_shift, self.injection.output_residual)
        self.injection = Injection(
            self.injection.visibility, None if self.injection.memory is None else self.cache.memory,
            *(None if part is None else part[where] for part in parts),
        )  # fmt: skip
        self.state = {name: value[where] for name, value in self.state.items()}
        self.starts = [self.starts[row] for row in rows]
        self.size = len(rows)
