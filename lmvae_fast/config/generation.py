"""How latents are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import ConfigError


@dataclass(frozen=True)
class GenerationConfig(ConfigBase):
    """How latents become text.

    Attributes:
        max_new_tokens: the most tokens per sentence, a prompt not counted; None for what the model's max_len leaves.
        min_new_tokens: no end or stop token before so many.
        do_sample: draw tokens; otherwise greedy.
        temperature, top_k, top_p, min_p: of the draw, in this order (``kernels/sample_token``). ``top_k`` 0, ``top_p`` 1.0
            and ``min_p`` 0.0 switch a filter off.
        repetition_penalty: above 1 makes tokens of the prompt and of the sentence so far less probable; also for greedy.
        seed: of the draw; None takes it from torch's generator. A sentence's draw depends on its row, not on its batch.
        num_samples: sentences drawn per latent; they share its projection.
        num_beams: above 1, beam search of that width instead of the greedy sentence.
        length_penalty: of beam search: a sentence's log-probability is divided by its length, end token included, to this
            power; 0 compares whole sentences, 1 tokens' averages.
        stop_tokens: ids that end a sentence, beside the tokenizer's end token; the token itself is not kept.
        logprobs: also return the log-probability of every token under the model's own distribution.
        batch_size: sentences decoded at a time.
        pack_weights: on a CPU, keep a second copy of a frozen decoder's weights in the layout its matrix units read fastest.
        weights: None for the decoder's own; "int8" decodes on a CPU with a frozen decoder's matrices rounded to 8 bits per
            output, an approximation that reads fewer bytes.
        cuda_graphs: on a CUDA device, record the decode step once per batch size and replay it; None does where it can.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_samples: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    logprobs: bool = False
    batch_size: int = 64
    pack_weights: bool = True
    weights: str | None = None
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        self._number("max_new_tokens", 1, integer=True, optional=True)
        self._number("min_new_tokens", 0, integer=True)
        self._number("temperature", 0.0, open_low=True)
        self._number("top_k", 0, integer=True)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, open_low=True)
        self._number("seed", 0, 2**63 - 1, integer=True, optional=True)
        self._number("num_samples", 1, integer=True)
        self._number("num_beams", 1, integer=True)
        self._number("length_penalty", 0.0)
        self._number("batch_size", 1, integer=True)
        self._flag("do_sample", "logprobs", "pack_weights", "cuda_graphs")
        self._choice("weights", ("int8",), optional=True)
        if self.weights is not None and not self.pack_weights:
            raise ConfigError(
                "weights in int8 are packed ones", value="pack_weights=False", remedy="leave one of them out"
            )
        stops = self.stop_tokens
        if not isinstance(stops, tuple) or not all(type(token) is int and token >= 0 for token in stops):
            raise ConfigError(
                "GenerationConfig.stop_tokens is out of range", value=repr(stops), limit="a tuple of token ids"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                "min_new_tokens exceeds max_new_tokens", value=self.min_new_tokens, limit=self.max_new_tokens,
                remedy="lower it",
            )  # fmt: skip
        filtered = (self.temperature, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)
        if not self.do_sample and (filtered or self.num_samples != 1):
            raise ConfigError(
                "temperature, top_k, top_p, min_p and num_samples only act when tokens are drawn",
                value="do_sample=False",
                remedy="set do_sample=True",
            )
        if self.num_beams > 1 and (self.do_sample or self.logprobs or self.repetition_penalty != 1.0):
            raise ConfigError(
                "beam search takes the most probable sentences of the model's own distribution",
                value=f"num_beams={self.num_beams} with do_sample, logprobs or repetition_penalty",
                remedy="leave them out",
            )
