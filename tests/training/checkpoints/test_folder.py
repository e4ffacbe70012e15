"""Checkpoints: whole or not there, whatever happens while one is written."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch

from lmvae_fast import files
from lmvae_fast.errors import CheckpointError, OutputError
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints import tensors as state

GROUPS = ("model", "optimizer")


def content(step):
    """Tensors that say which step they belong to: every kind that a checkpoint may hold."""
    base = torch.arange(2000.0).view(20, 100) + step
    shared = torch.full((7,), float(step))
    return {
        "model": {"w": base.t(), "b": base[3], "half": base.bfloat16(), "empty": torch.empty(0, 4)},
        "optimizer": {"w/step": torch.tensor(step), "one": shared, "two": shared},
    }


def save(folder, step, **options):
    return checkpoint.save(folder, step, content(step), {"step": step}, **options)


def assert_is(found, step):
    assert found.state == {"step": step}
    expected = content(step)
    assert found.tensors.keys() == expected.keys()
    for group, values in expected.items():
        assert found.tensors[group].keys() == values.keys()
        for name, value in values.items():
            assert found.tensors[group][name].dtype == value.dtype
            assert torch.equal(found.tensors[group][name], value)


def test_round_trip(tmp_path):
    path = save(tmp_path / "deep" / "folder", 7)
    assert path.name == "step-00000007"
    assert_is(checkpoint.load(path), 7)
    assert sorted(file.name for file in path.iterdir()) == [
        "COMPLETE.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip


def test_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2, protect=2)
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["5", "4", "2"]
    assert checkpoint.of_step(tmp_path, 2).name == "step-00000002"
    assert checkpoint.of_step(tmp_path, 3) is None


def test_steps_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step, keep=5)
    assert [checkpoint._order(path)[0] for path in checkpoint.complete(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_the_same_step_again_never_overwrites(tmp_path):
    first = save(tmp_path, 3)
    second = save(tmp_path, 3)
    assert first != second
    assert_is(checkpoint.load_latest(tmp_path), 3)
    assert checkpoint.complete(tmp_path) == [second]


def test_nothing_is_pickled(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert file.read_bytes()[:2] not in (b"\x80\x04", b"PK"), "a pickle or torch.save's archive"


# -- failures while writing ------------------------------------------------------------------------------------------

CALLS = ((os, "fsync"), (os, "rename"), (os, "replace"), (files, "save_file"), (json, "dump"), (os, "mkdir"))


def intercept(monkeypatch, act):
    """Call act(n, after) before and after the n-th system-level step of a save."""
    count = [0]

    def wrap(original):
        def wrapper(*args, **kwargs):
            count[0] += 1
            n = count[0]
            act(n, False)
            try:
                return original(*args, **kwargs)
            finally:
                act(n, True)

        return wrapper

    for module, name in CALLS:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    return count


def number_of_steps(folder):
    save(folder, 1, keep=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = intercept(monkeypatch, lambda n, after: None)
        save(folder, 2)
    return count[0]


def test_a_failure_at_any_step_leaves_the_old_checkpoint(tmp_path):
    steps = number_of_steps(tmp_path / "count")
    assert steps > 8
    failures = 0
    for failing in range(1, steps + 1):
        folder = tmp_path / str(failing)
        save(folder, 1)

        def act(n, after, failing=failing):
            if n == failing and not after:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as monkeypatch:
            intercept(monkeypatch, act)
            message = None
            try:
                save(folder, 2)
            except OutputError as error:
                message = str(error)
        if message is None:  # only a folder's fsync may fail without consequence
            assert_is(checkpoint.load_latest(folder), 2)
        else:
            failures += 1
            assert "earlier checkpoints are untouched" in message
            assert "free space" in message
            assert_is(checkpoint.load_latest(folder), 1)
            assert [path.name for path in folder.iterdir()] == ["step-00000001"], "rubbish was left behind"
        save(folder, 3)
        assert_is(checkpoint.load_latest(folder), 3)
    assert failures >= steps - 4


def test_a_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path):
    steps = number_of_steps(tmp_path / "count")
    outcomes = set()
    for killed in range(1, steps + 1):
        for after in (False, True):
            folder = tmp_path / f"{killed}-{after}"
            save(folder, 1, keep=1)
            child = os.fork()
            if child == 0:
                with pytest.MonkeyPatch.context() as monkeypatch:
                    act = lambda n, a: os.kill(os.getpid(), signal.SIGKILL) if (n, a) == (killed, after) else None  # noqa: B023, E731
                    intercept(monkeypatch, act)
                    save(folder, 2, keep=1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status)
            found = checkpoint.load_latest(folder)
            outcomes.add(found.state["step"])
            assert_is(found, found.state["step"])
            # ... and the next save cleans up after the dead one
            save(folder, 3, keep=1)
            assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert outcomes == {1, 2}


def test_a_kill_while_old_ones_are_removed(tmp_path, monkeypatch):
    """Removal takes the manifest first: what is half removed does not count as whole."""
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002"]


def test_a_full_disk(tmp_path):
    """A real failure of write(2), in Python and in safetensors' own code: a limit on the size of files."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            save(tmp_path, 2)
        except OutputError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_is(checkpoint.load_latest(tmp_path), 1)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", "/proc/lmvae"):
        with pytest.raises(OutputError, match="remedy: choose a folder you can write to"):
            files.check_writable(type(tmp_path)(folder))


def test_too_little_space(tmp_path, monkeypatch):
    tensors = {"w": torch.zeros(1000, 1000)}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000_000))
    with pytest.raises(OutputError, match=r"30\.0 MB free.*about 48\.\d MB"):
        checkpoint.check_space(tmp_path, tensors, keep=2)
    checkpoint.check_space(tmp_path, {"w": torch.zeros(1000)}, keep=2)


# -- damaged and foreign ones ----------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "is missing": lambda p: (p / "model.safetensors").unlink(),
    "truncated": lambda p: os.truncate(p / "optimizer.safetensors", 50),
    "corrupt": lambda p: flip(p / "model.safetensors"),
    "state.json is corrupt": lambda p: flip(p / "state.json"),
    "does not list": lambda p: (p / "COMPLETE.json").write_text(
        '{"format": "lmvae_fast.checkpoint", "version": 1, "files": {"state.json": 7}}'
    ),
    "never completed": lambda p: (p / "COMPLETE.json").unlink(),
    "cannot be read": lambda p: (p / "COMPLETE.json").write_text('{"for'),
    "not a checkpoint of this package": lambda p: (p / "COMPLETE.json").write_text('{"format": "other"}'),
    "another format version": lambda p: (p / "COMPLETE.json").write_text(
        (p / "COMPLETE.json").read_text().replace('"version": 1', '"version": 9')
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_and_the_one_before_taken(tmp_path, message):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[message](newest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(newest)
    if message == "never completed":  # a normal thing after a kill: nothing to warn of
        assert_is(checkpoint.load_latest(tmp_path), 1)
    else:
        with pytest.warns(UserWarning, match=f"skipping a damaged checkpoint.*{message}"):
            assert_is(checkpoint.load_latest(tmp_path), 1)


def test_all_damaged(tmp_path):
    flip(save(tmp_path, 1) / "model.safetensors")
    with pytest.warns(UserWarning, match="skipping"), pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoint.load_latest(tmp_path)


def test_foreign_folders(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="never completed, or is of another kind"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder there"):
        checkpoint.load(tmp_path / "absent")
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "absent") is None


# -- optimizer and random states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}, {"amsgrad": True}], ids=str)
def test_optimizer_state_round_trip(options):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)
        names = state.trainable_parameters(model)
        return model, names, torch.optim.AdamW(names.values(), lr=0.1, **options)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()

    model, names, optimizer = build()
    step(model, optimizer)
    flat = state.optimizer_tensors(optimizer, names)
    assert "0.weight/exp_avg" in flat
    assert not any(name.startswith("0.bias") for name in flat)
    other, other_names, other_optimizer = build()
    other.load_state_dict(model.state_dict())
    state.restore_optimizer(other_optimizer, other_names, flat)
    random = state.random_tensors()
    step(model, optimizer)
    state.restore_random(random)
    step(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="does not train"):
        state.restore_optimizer(other_optimizer, other_names, {"2.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="another shape"):
        state.restore_optimizer(other_optimizer, other_names, {"1.weight/exp_avg": torch.zeros(1)})


def test_random_states_round_trip():
    import random

    import numpy as np

    draw = lambda: (torch.randn(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist())  # noqa: E731
    draw()  # an odd number of Gaussians leaves one in store
    saved = state.random_tensors()
    first = draw()
    state.restore_random(saved)
    assert draw() == first
    with pytest.raises(CheckpointError, match="random states"):
        state.restore_random({"torch": torch.zeros(3, dtype=torch.uint8)})


def test_shared_and_strided_tensors_are_stored_whole():
    base = torch.arange(12.0).view(3, 4)
    stored = files.storable({"a": base, "b": base.t(), "c": base[1], "d": base})
    assert len({value.untyped_storage().data_ptr() for value in stored.values()}) == 4
    assert torch.equal(stored["b"], base.t())
    assert stored["c"].untyped_storage().nbytes() == 16
    assert files.fingerprint_tensors({"a": base}) != files.fingerprint_tensors({"a": base.view(4, 3)})
