"""Training in several processes: this process among its ranks, and what they exchange.

Every rank holds the whole of what trains, but for layers in pieces (sharding.py), and takes its share of each micro-batch.
After the backward passes of a step the ranks exchange gradients, and each then makes the same update. What is exchanged for
the projector's weight, most of what trains, is not its gradient (rows x latent_dim numbers) but the two factors it is the
product of (rows + latent_dim numbers a sentence), which every rank multiplies itself in the optimizer's pass: less to send
while a step has fewer than 2 * latent_dim sentences.

A run does not know how many ranks it has: batches, noise and data order are those of one process, so a checkpoint can be
continued by any number of them (docs/distributed.md says what dropout inside fine-tuned models makes of that).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError, DataError, DistributedError
from lmvae_fast.text.batch import Share

BUCKET_BYTES = 64 * 2**20  # gradients are summed in pieces of this size: few messages, and little copied at a time
# What may differ between the ranks of a run without changing its result.
_OWN_AFFAIR = {"threads"}
Value = TypeVar("Value")
Factors = tuple[Tensor, Tensor, "Tensor | None"]


@contextlib.contextmanager
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[torch.device | None]:
    """Join the ranks that torchrun has started, for as long as this lasts; nothing happens outside of torchrun.

    Yields the device of this rank (``cuda:LOCAL_RANK`` where there are GPUs), or None outside of torchrun. timeout: how
    long a rank waits for one that is alive but does not come. Raises DistributedError when the ranks do not find together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield None
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with _collective():
        # numbers that Python looks at travel between CPUs, so that no step waits for a GPU
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """What a broken connection raises, as an error that says what to do."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _lost(error) from error


@contextlib.contextmanager
def noticing_lost_ranks() -> Iterator[None]:
    """What collectives that are torch's own, those of FSDP, raise when a rank is gone, as the same error; all else passes."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):  # gloo's errors name its source file
            raise
        raise _lost(error) from error


def _lost(error: Exception) -> DistributedError:
    return DistributedError(
        "another rank of this run has died or does not answer",
        value=str(error).strip().splitlines()[0][:200],
        remedy="look for that rank's own message; the last checkpoint is whole: start again with --resume",
    )


class Ranks:
    """This process among those of the run; alone where torch.distributed has not been initialised.

    Every method is a collective: all ranks call it, in the same order. Alone, each is the identity.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world = dist.get_world_size() if joined else 1

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.rank == 0

    # -- at the start ------------------------------------------------------------------------------------------------

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Refuse ranks that were started on different data, models or recipes; the same error on every rank.

        Raises DataError for the data, ConfigError for all else, naming the field and each rank's value.
        """
        every = self.gather({name: value for name, value in identity.items() if name not in _OWN_AFFAIR})
        for name, value in every[0].items():
            if all(other.get(name) == value for other in every):
                continue
            shown: Any = [other.get(name) for other in every]
            if isinstance(value, dict):
                fields = {field: [other[name].get(field) for other in every] for field in value}
                shown = {field: found for field, found in fields.items() if any(one != found[0] for one in found)}
            error = DataError if name in ("train_data", "eval_data") else ConfigError
            raise error(
                f"the ranks of one run must have the same {name.replace('_', ' ')}",
                value=f"by rank: {shown}",
                remedy="start every rank with the same command line and the same files",
            )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.alone:
            return
        with _collective():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def wait(self, until_first_is_done: bool) -> None:
        """A pair of calls around work whose result rank 0 leaves on disk for the others: first True, afterwards False."""
        if not self.alone and self.first != until_first_is_done:
            with _collective():
                dist.barrier()

    # -- small things ------------------------------------------------------------------------------------------------

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value (anything picklable), by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _collective():
            dist.all_gather_object(found, value)
        return found

    def same(self, value: Value) -> Value:
        """Rank 0's value."""
        if self.alone:
            return value
        box = [value]
        with _collective():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, figures: Mapping[str, float], common: Sequence[str] = ()) -> dict[str, float]:
        """Sums over the ranks, by name; of ``common`` figures, which all ranks have alike, rank 0's."""
        if self.alone:
            return dict(figures)
        own = [value if self.first or name not in common else 0.0 for name, value in figures.items()]
        sums = torch.tensor(own, dtype=torch.float64)
        with _collective():
            dist.all_reduce(sums)
        return dict(zip(figures, sums.tolist(), strict=True))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on the CPU."""
        tensor = tensor.cpu()
        if not self.alone:
            with _collective():
                dist.all_reduce(tensor)
        return tensor

    def any_stop(self, reason: str | None) -> str | None:
        """A reason to stop, if any rank has one (the lowest rank's): all must stop after the same step."""
        if self.alone:
            return reason
        flag = torch.tensor([int(reason is not None)])
        with _collective():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not int(flag):
            return None
        return next(found for found in self.gather(reason) if found is not None)

    # -- a step ------------------------------------------------------------------------------------------------------

    def share(self, sentences: int, bounds: tuple[int, ...] | None = None) -> Share | None:
        """This rank's part of a batch: every world-th sentence, so that ranks get sentences of like lengths; None alone.

        bounds: where groups begin that must not be split, and the end: then every world-th group.
        """
        return None if self.alone else Share(self.rank, self.world, sentences, bounds)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks."""
        if self.alone:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with _collective():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(piece.view_as(gradient))

    def gather_factors(self, kept: Sequence[Factors]) -> list[Factors]:
        """The factors (gradient of the memory [L, 2, B, Hkv, M, D], z [B, nz], seed [2] or None) of all ranks' sentences.

        Every rank has as many entries, one for each micro-batch; their B may differ.
        """
        found = []
        for gradient, z, seed in kept:
            sizes = [int(size) for size in self._all(torch.tensor([z.shape[0]]))]
            seeds = [None] * self.world if seed is None else self._all(seed)
            every = zip(self._padded(gradient, 2, sizes), self._padded(z, 0, sizes), seeds, strict=True)
            found += list(every)
        return found

    def _padded(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
        """Tensors of all ranks, of given sizes in ``dim`` and alike otherwise."""
        short = max(sizes) - tensor.shape[dim]
        if short:
            shape = list(tensor.shape)
            shape[dim] = short
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim)
        return [t.narrow(dim, 0, size) for t, size in zip(self._all(tensor), sizes, strict=True)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with _collective():
            dist.all_gather(found, tensor.contiguous())
        return found


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to BUCKET_BYTES together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
