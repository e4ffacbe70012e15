"""Training steps as recordings: one graph a step, where the host would launch hundreds of kernels.

A recording holds kernels and addresses. So a batch is first filled up to one of few sizes (`Size`), then copied into tensors
that stay where they are (`StepInputs`), and the numbers that change from step to step (seed, weight of the KL, learning rate,
the step's position) are tensors as well. Forward, backward, the watch for figures that are not finite, the running means,
clipping and the update are all within; nothing is left to the host but to make the next batch, which it does meanwhile.

What cannot be recorded is run kernel by kernel, and the reason is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.backend import current
from lmvae_fast.models.decoder.recorded_step import CAPTURES, Capture, CudaGraph, Graph, without_copies
from lmvae_fast.text.batch import Batch, filled
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.stopping import FiniteWatch

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 32  # of one run: each holds an executable graph; their tensors share one pool of memory
_LEAST_TOKENS = 64  # by which sizes grow, or an eighth of the size's power of two where that is more
_LONGEST = 8  # lengths of sentences grow by so many
_SAME = 1e-3  # of a step's movement: how far a replay may be from it (the order of sums may differ)


class Size(NamedTuple):
    """What a recorded step has of everything: ``sentences`` with ``fillers`` among them, ``tokens``, and the ``longest``."""

    sentences: int
    fillers: int
    tokens: int
    longest: int


def size_of(sentences: int, tokens: int, longest: int, max_len: int) -> Size:
    """The size that a batch is filled up to: an eighth of its tokens more at most, or 64."""
    longest = max(longest, min(-(-longest // _LONGEST) * _LONGEST, max_len))
    grain = max(_LEAST_TOKENS, (1 << tokens.bit_length()) // 16)
    # So many that they can have any number of tokens from one each to a grain more.
    fillers = -(-(grain - 1) // max(longest - 1, 1))
    return Size(sentences + fillers, fillers, -(-(tokens + fillers) // grain) * grain, longest)


def reason_against(model: Any, config: TrainConfig, ranks: Ranks, *, pooled: bool, grouped: bool) -> str | None:
    """Why a run's steps cannot be recorded, or None. pooled: features of the encoder are there; grouped: batches are of
    prompts with responses."""
    known = (
        (config.accumulation > 1, f"accumulation={config.accumulation}: a recording is of one batch"),
        (config.precision == "fp16", "precision='fp16': the gradient scaler decides on the host"),
        (config.compile, "compile=True"),
        (config.recompute_decoder, "recompute_decoder=True draws on the random generator's state"),
        (config.embedding_rows_update, "embedding_rows_update: the rows that have a gradient are found on the host"),
        (not ranks.alone, f"{ranks.world} processes exchange gradients on the host's word"),
        # transformers looks on the host whether a batch has padding
        (not pooled, "the encoder reads the sentences in every step"),
        (grouped, "batches are of prompts with responses"),
        (model.config.free_running, "free_running: the host looks whether the decoder's own tokens still change"),
        (model.bag_of_words is not None or bool(model.config.contrast), "the objective has auxiliary parts"),
        (current() == "reference", "backend('reference')"),
    )
    return next((reason for holds, reason in known if holds), None)


def capture_of(device: torch.device, wanted: bool | None, against: Callable[[], str | None]) -> Capture | None:
    """What records the steps of a run; None where nothing can, or nothing is to (``TrainConfig.cuda_graphs``).

    against: says what keeps this run from it (`reason_against`); asked where the device could. Raises ConfigError where a
    recording is wanted and cannot be had.
    """
    capture = CAPTURES.get(device.type)
    reason = f"the model is on {device}" if capture is None else against() if wanted is not False else None
    if wanted and reason is not None:
        raise ConfigError(
            "the steps of this run cannot be recorded as CUDA graphs", value=reason,
            remedy="leave cuda_graphs at None, which records where it can",
        )  # fmt: skip
    if capture is None or wanted is False:
        return None
    if reason is not None:
        logger.info("training steps are run kernel by kernel instead of as one graph: %s", reason)
        return None
    if capture is CudaGraph:  # one pool for all sizes: no two of them run at once, and what must last is outside
        return partial(CudaGraph, pool=torch.cuda.graph_pool_handle())
    return capture


def moved(state: Any, watch: FiniteWatch) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors that a step of a run changes in place, and those of them that are linear in its gradients and figures.

    state: the run's `RunState`.
    """
    optimizer = state.optimizer.tensors()
    figures = [state.means.sums]
    judged = figures + [x for name, x in optimizer.items() if name.endswith("/exp_avg")]
    return [*state.parameters.values(), *optimizer.values(), *figures, watch.state], judged


class StepInputs:
    """A batch of one size and a step's numbers, in tensors that stay where they are."""

    def __init__(self, size: Size, like: Batch, device: torch.device) -> None:
        self.size, self.device = size, device
        counts = {
            "input_ids": size.tokens, "labels": size.tokens, "rows": size.tokens, "token_index": size.tokens,
            "tokens": size.sentences, "indices": size.sentences, "cu_seqlens": size.sentences + 1, "seed": 2, "position": 1,
        }  # fmt: skip
        self._whole = torch.zeros(sum(counts.values()), dtype=torch.int64, device=device)
        self._parts = dict(zip(counts, self._whole.split(list(counts.values())), strict=True))
        self._pooled, self._annotations = (
            None if x is None else torch.zeros(size.sentences, *x.shape[1:], dtype=x.dtype, device=device)
            for x in (like.pooled, like.annotations)
        )
        self.beta = torch.zeros((), device=device)

    @property
    def seed(self) -> Tensor:
        """Seed and offset of the step's noise, int64 ``[2]``."""
        return self._parts["seed"]

    @property
    def position(self) -> Tensor:
        """The first of the numbers by which the step's figures are watched, an int64 scalar."""
        return self._parts["position"][0]

    def fill(self, batch: Batch, *, seed: int, position: int, beta: float) -> None:
        """Take over a batch of this size, and the step's numbers: two or three copies, none of which the host waits for."""
        given = {"seed": torch.tensor([seed, 0]), "position": torch.tensor([position])}
        named = {name: given[name] if name in given else getattr(batch, name) for name in self._parts}
        self._copy(self._whole, torch.cat([x.to(torch.int64) for x in named.values()]))
        for static, x in ((self._pooled, batch.pooled), (self._annotations, batch.annotations)):
            if static is not None:
                self._copy(static, x)
        self.beta.fill_(beta)

    def _copy(self, static: Tensor, x: Tensor | None) -> None:
        assert x is not None
        # Pinned anew each time: torch's allocator gives pinned memory out again only when the copy from it is over.
        static.copy_(x.pin_memory() if self.device.type == "cuda" else x, non_blocking=True)

    def batch(self) -> Batch:
        """The batch over these tensors; to be made within the recorded step, for it converts the offsets."""
        parts = {name: x for name, x in self._parts.items() if name not in ("seed", "position", "cu_seqlens")}
        return Batch(
            **parts, cu_seqlens=self._parts["cu_seqlens"].to(torch.int32), max_seqlen=self.size.longest,
            pooled=self._pooled, annotations=self._annotations, fillers=self.size.fillers,
        )  # fmt: skip


class _Recording:
    """A size's step: its inputs, and what replays it once it is recorded. `zero_beta`: for steps at which the KL has no weight,
    where some objectives do something else."""

    def __init__(self, inputs: StepInputs, zero_beta: bool) -> None:
        self.inputs, self.zero_beta = inputs, zero_beta
        self.calls = 0
        self.graph: Graph | None = None
        self.moved: list[Tensor] = []  # what a replay writes


class RecordedSteps:
    """Steps of one run, each size recorded at its second batch; the first one makes what is made lazily.

    Args:
        step: does a step over inputs, in place; second argument: the weight of the KL, a number or a scalar tensor.
        state: gives all tensors that a step moves on, and of them those by which a replay is judged (linear in gradients).
        capture: records a function, and in doing so does it once.
    """

    def __init__(
        self,
        step: Callable[[StepInputs, float | Tensor], None],
        state: Callable[[], tuple[list[Tensor], list[Tensor]]],
        capture: Capture,
        max_len: int,
    ) -> None:
        self._step, self._state, self._capture, self._max_len = step, state, capture, max_len
        self._recordings: dict[tuple[Size, bool], _Recording] = {}
        self._checked = False
        self.refused: str | None = None  # why no step is recorded any more

    @property
    def recordings(self) -> int:
        """Sizes that are recorded."""
        return sum(found.graph is not None for found in self._recordings.values())

    def forget(self) -> None:
        """Let go of all recordings: what they read may lie elsewhere from now on."""
        self._recordings.clear()

    def __call__(self, batch: Batch, device: torch.device, *, seed: int, position: int, beta: float) -> None:
        """One step on a batch that lies on the host."""
        size = size_of(batch.batch_size, batch.num_tokens, batch.max_seqlen, self._max_len)
        key = (size, beta == 0.0)
        found = self._recordings.get(key)
        if found is None:
            found = self._recordings[key] = _Recording(StepInputs(size, batch, device), beta == 0.0)
        inputs = found.inputs
        inputs.fill(filled(batch, size.tokens, size.fillers, size.longest), seed=seed, position=position, beta=beta)
        found.calls += 1
        if found.graph is not None:
            found.graph.replay()
            torch.autograd.graph.increment_version(found.moved)
        elif found.calls == 1 or self.refused is not None or self.recordings >= MOST_RECORDINGS:
            self._run(found)
        else:
            self._record(found)

    def _run(self, found: _Recording) -> None:
        self._step(found.inputs, 0.0 if found.zero_beta else found.inputs.beta)

    def _record(self, found: _Recording) -> None:
        """Do the step and have it recorded; the first recording is compared with the step itself."""
        everything, judged = self._state()
        device, found.moved = found.inputs.device, everything
        generators = _generators(device)
        before = [x.clone() for x in everything]
        after = None
        if not self._checked:
            self._run(found)
            after = [x.clone() for x in everything]
            _restore(everything, before)
        try:
            with without_copies(device.type):
                graph = self._capture(partial(self._run, found), device)
            if after is not None:
                _restore(everything, before)
                _set_generators(device, generators)
                graph.replay()
                places = [i for i, x in enumerate(everything) if any(x is y for y in judged)]
                moved, apart = _distance(after, before, places), _distance(everything, after, places)
                if not bool(apart <= _SAME * moved):
                    raise RuntimeError(f"a replay moved the state by {apart:.3g} of {moved:.3g} elsewhere")
        except RuntimeError as error:
            self.refused = str(error).strip().split("\n")[0]
            logger.warning("training steps are run kernel by kernel instead of as one graph: %s", self.refused)
            _restore(everything, before)
            self._run(found)
            return
        found.graph, self._checked = graph, True


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for x, value in zip(tensors, values, strict=True):
            x.copy_(value)


def _generators(device: torch.device) -> list[Tensor]:
    """The states that dropout draws from: of the CPU's generator, and of the device's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _distance(a: list[Tensor], b: list[Tensor], places: list[int]) -> float:
    """Euclidean distance of two states, over the tensors at these places."""
    squares = [(a[i].detach().double() - b[i].detach().double()).square().sum() for i in places]
    return float(torch.stack(squares).sum().sqrt())
