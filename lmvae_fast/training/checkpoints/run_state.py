"""A run's state into a checkpoint and back: what trains, the optimizer, random generators, counters, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.config.base import ConfigBase
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints import identity, shards
from lmvae_fast.training.checkpoints.tensors import random_tensors, restore_random
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.optimizer import Optimizer
from lmvae_fast.training.records import Progress
from lmvae_fast.training.running_means import RunningMeans
from lmvae_fast.training.schedule import Plateau


@dataclass
class RunState:
    """All that a run is between two steps, so that one that was killed goes on from it.

    Attributes:
        model: an LMVAE. parameters: name -> parameter of what trains of it, as it is held during the run.
        optimizer, plateau, means, progress: of the run so far.
        identity: what the run is (`identity.identity`). device: where the model is. ranks: of the run.
    """

    model: Any
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    plateau: Plateau
    means: RunningMeans
    progress: Progress
    identity: dict[str, Any]
    device: torch.device
    ranks: Ranks

    def tokens_of_all(self) -> int:
        """Tokens that all ranks have processed."""
        return int(self.ranks.total({"tokens": self.progress.tokens})["tokens"])


def save(state: RunState, folder: Path, *, keep: int) -> Path:
    """Write the checkpoint of the step that has been done below `folder`, all ranks together, and return it.

    Rank 0 writes what it has whole, every rank its pieces of what none has whole. keep: newest checkpoints that stay.
    """
    ranks = state.ranks
    progress = replace(state.progress, window=state.means.read(), tokens=state.tokens_of_all())
    groups = {"model": state.model.trainable_state_dict(), "optimizer": state.optimizer.tensors()}
    whole, parts = shards.split(groups)
    if not ranks.first:
        if parts:
            shards.write(ranks.same(folder), parts)
        return ranks.same(folder)
    values = {
        "progress": asdict(progress),
        "plateau": state.plateau.state_dict(),
        "scaler": state.optimizer.scaler.state_dict(),
        "beta": state.model.beta,
        "free_running_rest": state.model.free_running.rest,
        "identity": state.identity,
    }
    best = state.progress.best
    path = checkpoint.save(
        folder,
        state.progress.step,
        {**whole, "random": random_tensors(state.device)},
        values,
        keep=keep,
        protect=None if best is None else best["step"],
        write_pieces=(lambda inside: shards.write(ranks.same(inside), parts)) if parts else None,
    )
    return ranks.same(path)


def restore(state: RunState, found: checkpoint.Checkpoint, folder: Path) -> None:
    """Go on from a checkpoint, whichever number of ranks wrote it and whatever of it was in pieces.

    Newer ones in `folder` are set aside. Raises what `identity.check` raises.
    """
    kind = type(state.model.config)
    model = kind if issubclass(kind, ConfigBase) else LMVAEConfig
    identity.check(found.state["identity"], state.identity, model=model)
    groups = {name: found.tensors[name] for name in ("model", "optimizer")}
    joined = shards.joined(groups, found.pieces, state.parameters)
    state.model.load_trainable_state_dict(joined["model"])
    state.optimizer.restore(joined["optimizer"])
    state.progress = Progress(**found.state["progress"])
    if not state.ranks.first:  # sums of the whole run are rank 0's to go on with
        state.progress = replace(state.progress, tokens=0, window={})
    state.means.reset(state.progress.window)
    state.plateau.load_state_dict(found.state["plateau"])
    if state.optimizer.scaler.is_enabled():
        state.optimizer.scaler.load_state_dict(found.state["scaler"])
    state.model.beta = found.state["beta"]
    state.model.free_running.rest = found.state.get("free_running_rest", 0)
    state.ranks.gather(None)  # all have read it
    if state.ranks.first:
        checkpoint.set_aside(folder, after=found.path)
        restore_random(found.tensors["random"], state.device)
