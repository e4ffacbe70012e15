"""A run's state into a checkpoint and back: what trains, the optimizer, random generators, counters, schedules."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lmvae_fast.training import checkpoint, pieces, resume
from lmvae_fast.training.progress import Progress
from lmvae_fast.training.state import random_tensors, restore_random

if TYPE_CHECKING:
    from lmvae_fast.training.loop import Trainer


def save(run: Trainer) -> None:
    """Write the checkpoint of the step that has been done; all ranks together.

    Rank 0 writes what it has whole, every rank its pieces of what none has whole. Afterwards `run.last_checkpoint` is it.
    """
    progress = replace(run.progress, window=run.window.read(), tokens=tokens_of_all(run))
    groups = {"model": run.model.trainable_state_dict(), "optimizer": run.update.tensors()}
    whole, parts = pieces.split(groups)
    if not run.ranks.first:
        if parts:
            pieces.write(run.ranks.same(run.folder), parts)
        run.last_checkpoint = run.ranks.same(run.last_checkpoint)
        return
    state = {
        "progress": asdict(progress),
        "plateau": run.plateau.state_dict(),
        "scaler": run.update.scaler.state_dict(),
        "beta": run.model.beta,
        "free_running_rest": run.model.free_running.rest,
        "identity": run.identity,
    }
    best = run.progress.best
    run.last_checkpoint = checkpoint.save(
        run.folder,
        run.step,
        {**whole, "random": random_tensors(run.device)},
        state,
        keep=run.config.keep_checkpoints,
        protect=None if best is None else best["step"],
        write_pieces=(lambda folder: pieces.write(run.ranks.same(folder), parts)) if parts else None,
    )
    run.ranks.same(run.last_checkpoint)
    run.tell("on_checkpoint", run.last_checkpoint)


def restore(run: Trainer, found: checkpoint.Checkpoint) -> None:
    """Go on from a checkpoint, whichever number of ranks wrote it and whatever of it was in pieces."""
    resume.check(found.state["identity"], run.identity)
    groups = pieces.joined({name: found.tensors[name] for name in ("model", "optimizer")}, found.pieces, run.parameters)
    run.model.load_trainable_state_dict(groups["model"])
    run.update.restore(groups["optimizer"])
    run.progress = Progress(**found.state["progress"])
    if not run.ranks.first:  # sums of the whole run are rank 0's to go on with
        run.progress = replace(run.progress, tokens=0, window={})
    run.window.reset(run.progress.window)
    run.plateau.load_state_dict(found.state["plateau"])
    if run.update.scaler.is_enabled():
        run.update.scaler.load_state_dict(found.state["scaler"])
    run.model.beta = found.state["beta"]
    run.model.free_running.rest = found.state.get("free_running_rest", 0)
    run.last_checkpoint = found.path
    run.ranks.gather(None)  # all have read it
    if run.ranks.first:
        checkpoint.set_aside(run.folder, after=found.path)
        restore_random(found.tensors["random"], run.device)


def tokens_of_all(run: Trainer) -> int:
    """Tokens that all ranks have processed."""
    return int(run.ranks.total({"tokens": run.progress.tokens})["tokens"])
