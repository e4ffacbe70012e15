"""A run's state into a checkpoint and back: what trains, the optimizer, random generators, counters, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.config.base import ConfigBase
from lmvae_fast.errors import CheckpointError
from lmvae_fast.training.callbacks import is_record
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
    check_state(found)
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


_IDENTITY: dict[str, Any] = {
    "train_config": dict, "model_config": dict, "frozen": str, "train_data": str, "eval_data": (str, type(None)), "torch": str,
    "threads": int, "device": str,
}  # fmt: skip


def check_state(found: checkpoint.Checkpoint) -> None:
    """Raises CheckpointError for a state that fits its manifest and yet is none that a run can have had."""
    state, place = found.state, found.path / checkpoint.STATE

    def refused(what: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f"{place}: {what} is not what a run writes", value=value, remedy="resume from another checkpoint of the run"
        )

    if not isinstance(state, dict):
        raise refused("the whole", type(state).__name__)
    progress, who, plateau = (state.get(name) for name in ("progress", "identity", "plateau"))
    names = {field.name for field in fields(Progress)}
    if not isinstance(progress, dict) or progress.keys() != names:
        raise refused("progress", progress)
    for name in ("step", "sentences", "tokens", "waited"):
        if type(progress[name]) is not int or progress[name] < 0:
            raise refused(f"progress.{name}", progress[name])
    if not _is_number(progress["seconds"]) or progress["seconds"] < 0:
        raise refused("progress.seconds", progress["seconds"])
    if progress["step"] != checkpoint.step_of(found.path):
        raise refused("progress.step", f"{progress['step']} in {found.path.name}")
    window = progress["window"]
    if not isinstance(window, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in window.items()):
        raise refused("progress.window", window)
    best = progress["best"]
    if best is not None and (
        not is_record(best) or not _is_number(best.get("monitored")) or best["step"] > progress["step"]
    ):
        raise refused("progress.best", best)
    if not isinstance(who, dict) or not all(isinstance(who.get(name), kind) for name, kind in _IDENTITY.items()):
        raise refused("identity", who)
    if not isinstance(plateau, dict) or not {"scale", "best", "waited"} <= plateau.keys():
        raise refused("plateau", plateau)
    if not _is_number(plateau["scale"]) or type(plateau["waited"]) is not int:
        raise refused("plateau", plateau)
    if plateau["best"] is not None and not _is_number(plateau["best"]):
        raise refused("plateau.best", plateau["best"])
    missing = [group for group in ("model", "optimizer", "random") if group not in found.tensors]
    if missing:
        raise refused("the groups of tensors", f"without {', '.join(missing)}")
    if "beta" in state and (not _is_number(state["beta"]) or state["beta"] < 0):
        raise refused("beta", state["beta"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
