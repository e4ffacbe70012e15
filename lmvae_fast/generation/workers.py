"""Blocks of latents decoded by several processes, handed back in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import ConfigError, OutputError
from lmvae_fast.generation.engine import Generated, generate
from lmvae_fast.kernels.backend import backend as use_backend
from lmvae_fast.memory import check_memory
from lmvae_fast.models.lmvae import LMVAE

_PROCESS_BYTES = 200 << 20  # of torch and what it reads, in each, without a model

_model: LMVAE | None = None  # of a worker process


@dataclass(frozen=True)
class Block:
    """Latents ``[N, latent_dim]`` that are decoded by themselves, the index of the first, and what goes with them: one
    prompt for all or one each, pooled labels ``[N, labels]``."""

    latents: Tensor
    first_index: int
    prompts: str | list[str] | None = None
    annotations: Tensor | None = None

    def decode(self, model: LMVAE, config: GenerationConfig) -> Iterator[Generated]:
        """Their sentences, in order."""
        return generate(
            model,
            self.latents,
            config,
            annotations=self.annotations,
            prompts=self.prompts,
            first_index=self.first_index,
        )


class Workers:
    """Processes that each hold the model of a folder; on several GPUs, worker w takes GPU w.

    Args:
        load: makes the model of ``source`` on a device; a function that can be pickled by name.
        source: folder of the model.
        count: number of processes; a CPU's cores are shared out among them.
        backend: kernels to use, as in ``lf.backend``.

    Raises:
        ConfigError: fewer than one worker, or more workers than GPUs where there are GPUs. MemoryLimitError: more than
            the machine has room for.
    """

    def __init__(self, load: Callable[[str, str], LMVAE], source: str, count: int, backend: str = "auto"):
        if count < 1:
            raise ConfigError("workers are processes that decode", value=count, limit=">= 1")
        gpus = torch.cuda.device_count()
        if 0 < gpus < count:
            raise ConfigError("every worker takes a GPU of its own", value=f"{count} workers", limit=f"{gpus} GPUs")
        check_memory(f"{count:,} processes that decode", "lower workers", count * _PROCESS_BYTES)
        context = multiprocessing.get_context("spawn")  # a forked child must not touch CUDA or OpenMP
        self.count, numbers = count, context.Queue()
        for number in range(count):
            numbers.put(number)
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._pool = ProcessPoolExecutor(count, context, _begin, (load, source, numbers, threads, gpus > 0, backend))

    def decode(self, blocks: Iterable[Block], config: GenerationConfig) -> Iterator[list[Generated]]:
        """The sentences of each block, in order; a few blocks are under way at any time.

        Raises OutputError when a worker process dies: what was handed back before is whole.
        """
        pending: deque[Future] = deque()
        try:
            for block in blocks:
                pending.append(self._pool.submit(_decode, block, config))
                if len(pending) > 2 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OutputError(
                "a worker process ended unexpectedly",
                remedy="run again to continue; with fewer workers if memory ran out",
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin(load: Callable[[str, str], LMVAE], source: str, numbers, threads: int, on_gpu: bool, backend: str) -> None:
    global _model
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _model = load(source, f"cuda:{numbers.get()}" if on_gpu else "cpu").eval()
    use_backend(backend).__enter__()  # for the life of the process


def _end_with_the_parent() -> None:
    """Without a parent, which may have been killed, nobody would ever ask for anything or end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _decode(block: Block, config: GenerationConfig) -> list[Generated]:
    assert _model is not None
    return list(block.decode(_model, config))
