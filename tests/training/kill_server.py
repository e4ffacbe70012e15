"""Kill training at random points until it has happened often enough, resuming each time; then compare.

    python -m tests.training.kill_server FOLDER KILLS SEED MODEL [PLACE ...]

PLACE: "while saving", "between checkpoints": goes on until a kill has hit each of them.

A process of its own, with one thread: it imports everything once and forks a child per attempt, so that twenty attempts
cost twenty forks and not twenty imports of torch. Prints one line of JSON: kills, by where they hit, and the runs that
were compared.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from lmvae_fast.training.checkpoints import folder as checkpoint
from tests.training.helpers import assert_same_checkpoint, assert_same_history, run


@functools.cache  # children inherit it
def frozen_vae():
    from lmvae_fast.testing import make_model

    return make_model(max_len=12).eval()


def train_once(folder: Path, kind: str, **changes) -> None:
    """A run of a kind of model to its end; `changes`: of its settings."""
    if kind == "flow":
        from tests.training.test_flow_loop import run as run_flow

        run_flow(folder, frozen_vae(), epochs=5, **changes)
    elif kind == "fake":
        from tests.training.fake_model import FakeModel

        run(folder, model=FakeModel(), **changes)
    else:
        from lmvae_fast.testing import make_model

        run(folder, model=make_model(max_len=12, projector_dropout=0.1), **changes)


def attempt(folder: Path, kind: str, wait: float | None) -> bool:
    """Train (resuming) in a child; kill it after `wait` seconds unless it has ended. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            # saves every 2 steps: with its fsyncs saving takes most of the time, so most kills hit a save
            train_once(folder, kind, resume=True, save_every=2, eval_every=5)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if wait is not None:
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)  # no effect on one that has ended and waits to be reaped
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a child ended by itself with code {code}")
    return code != 0


def where(folder: Path) -> str:
    """What the kill left: nothing yet, an unfinished checkpoint, or only whole ones."""
    found = folder / "checkpoints"
    if not found.is_dir() or not any(found.iterdir()):
        return "before the first checkpoint"
    return "while saving" if len(list(found.iterdir())) > len(checkpoint.complete(found)) else "between checkpoints"


def main(folder: Path, kills: int, seed: int, kind: str, places: list[str]) -> None:
    train_once(folder / "warm", kind)  # in this process: children inherit what libraries load on first use
    started = time.monotonic()
    attempt(folder / "unbroken", kind, None)
    longest = 0.3 * (time.monotonic() - started)
    delays = random.Random(seed)
    hits: dict[str, int] = {}
    runs = 0

    def enough() -> bool:
        return sum(hits.values()) >= kills and all(place in hits for place in places)

    while not enough():
        # A run may end before all kills are spent: then another one takes the rest. The last is left alone to its end.
        runs += 1
        target = folder / f"killed-{runs}"
        before = sum(hits.values())
        while attempt(target, kind, None if enough() else delays.uniform(0, longest)):
            place = where(target)
            hits[place] = hits.get(place, 0) + 1
            if place == "before the first checkpoint":
                longest *= 1.1  # the machine is busier than it was: let runs get somewhere
        if sum(hits.values()) == before and not enough():
            longest *= 0.5  # it is less busy: kill before the end
        one, two = (checkpoint.complete(path / "checkpoints")[0] for path in (target, folder / "unbroken"))
        assert_same_checkpoint(one, two)
        assert_same_history(target, folder / "unbroken")
    print(json.dumps({"kills": hits, "runs": runs, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
