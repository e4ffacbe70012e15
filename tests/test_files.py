"""Nothing is deleted or overwritten that was not made here, replacing has no hole, and one process writes at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmvae_fast import files, temporaries
from lmvae_fast.errors import OutputError
from tests.processes import PATIENCE


def folder_with(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def snapshot(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_folder_is_ours_when_it_is_empty_or_marked(tmp_path):
    files.check_ours(tmp_path / "new", "profile")
    files.claim(tmp_path / "new", "profile")
    assert files.made_as(tmp_path / "new") == "profile"
    (tmp_path / "new" / "report.html").write_text("x")
    files.claim(tmp_path / "new", "profile")
    with pytest.raises(OutputError, match=r"training run.*left alone") as told:
        files.claim(tmp_path / "new", "training run")
    assert told.value.value == "a profile"
    files.check_ours(tmp_path / "new", "training run", "profile")
    mine = folder_with(tmp_path / "mine", notes="mine")
    before = snapshot(mine)
    with pytest.raises(OutputError, match="left alone") as told:
        files.claim(mine, "profile")
    assert "notes" in told.value.value
    assert snapshot(mine) == before
    with pytest.raises(OutputError, match="no folder"):
        files.claim(mine / "notes", "profile")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "another", "kind": "profile"}', '{"kind": "profile"}'])
def test_a_mark_that_is_not_ours_is_none(tmp_path, text):
    (tmp_path / files.MARK).write_text(text)
    assert files.made_as(tmp_path) is None
    with pytest.raises(OutputError, match="left alone"):
        files.check_ours(tmp_path, "profile")


def test_a_folder_to_be_replaced_holds_nothing_else(tmp_path):
    files.claim(tmp_path / "out", "checkpoint")
    (tmp_path / "out" / "weights").write_text("x")
    files.check_ours(tmp_path / "out", "checkpoint", contents=("weights",))
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="would be replaced") as told:
        files.check_ours(tmp_path / "out", "checkpoint", contents=("weights",))
    assert told.value.value == "thesis.tex"


def test_a_folder_to_be_replaced_holds_nothing_else_within_its_folders(tmp_path):
    out = tmp_path / "out"
    (out / "part" / "deep").mkdir(parents=True)
    (out / "part" / "deep" / "odd.name").write_text("x")
    files.mark(out, "checkpoint", complete=True)
    files.check_ours(out, "checkpoint", contents=("part",))
    files.check_ours(out, "checkpoint", replaced=True)
    (out / "part" / "deep" / "notes.txt").write_text("mine")
    for options in ({"contents": ("part",)}, {"replaced": True}):
        with pytest.raises(OutputError, match="would be replaced") as told:
            files.check_ours(out, "checkpoint", **options)
        assert told.value.value == "part/deep/notes.txt"
    files.check_ours(out, "checkpoint")  # one that is written into and not replaced


def test_a_drawing_overwrites_only_drawings(tmp_path):
    files.check_file_ours(tmp_path / "new.html")
    (tmp_path / "mine.html").write_text("<html>mine")
    with pytest.raises(OutputError, match="left alone"):
        files.check_file_ours(tmp_path / "mine.html")
    (tmp_path / "ours.html").write_text(f"<html><meta name=generator content={files.GENERATOR}>")
    files.check_file_ours(tmp_path / "ours.html")
    with pytest.raises(OutputError, match="no file"):
        files.check_file_ours(tmp_path)


class Killed(BaseException):
    """Stands for a kill at an operation."""


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanging(request, monkeypatch, tmp_path):
    """Both ways to replace a folder; the first where this system has it."""
    if request.param:
        one, two = folder_with(tmp_path / "one"), folder_with(tmp_path / "two")
        if not files.exchange(one, two):
            pytest.skip("this system cannot exchange two names")
    else:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    return request.param


def test_replacing_a_folder(tmp_path, exchanging):
    old, new = folder_with(tmp_path / "model", a="old", b="old"), folder_with(tmp_path / "made", a="new")
    files.replace_folder(new, old)
    assert snapshot(old) == {"a": "new"}
    assert not new.exists()
    files.replace_folder(folder_with(tmp_path / "made", a="first"), tmp_path / "another")
    assert snapshot(tmp_path / "another") == {"a": "first"}
    assert {path.name for path in tmp_path.iterdir()} - {"one", "two"} == {"model", "another"}


def test_a_kill_at_any_point_leaves_one_of_the_two(tmp_path, exchanging, monkeypatch):
    """After each file operation in turn; then the next reader and the next writer come."""
    real = {"rename": Path.rename, "remove": files.remove, "exchange": files.exchange}
    points = 0
    while True:
        place = tmp_path / f"{points}"
        old, new = folder_with(place / "model", a="old"), folder_with(files.temporary_beside(place / "model"), a="new")
        left = [points]

        def counted(name, left=left):
            def operation(*arguments):
                result = real[name](*arguments)
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return result

            return operation

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted("rename"))
            patch.setattr(files, "remove", counted("remove"))
            patch.setattr(files, "exchange", counted("exchange"))
            try:
                files.replace_folder(new, old)
                ended = True
            except Killed:
                ended = False
        if exchanging:
            assert old.is_dir(), "there is an instant without a model under its name"
        files.recover_folder(old)
        assert snapshot(old) in ({"a": "old"}, {"a": "new"})
        if ended:
            break
        files.replace_folder(folder_with(place / "made", a="later"), old)
        assert snapshot(old) == {"a": "later"}
        points += 1
    assert points >= 2


def test_an_exchange_that_the_file_system_lacks(tmp_path, monkeypatch):
    class Library:
        @staticmethod
        def renameat2(*arguments):
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *arguments, **options: Library)
    for number in (errno.ENOSYS, errno.EINVAL):
        monkeypatch.setattr(files.ctypes, "get_errno", lambda number=number: number)
        assert files.exchange(tmp_path / "a", tmp_path / "b") is False
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EACCES)
    with pytest.raises(PermissionError):
        files.exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *arguments, **options: object())
    assert files.exchange(tmp_path / "a", tmp_path / "b") is False


def test_what_the_dead_left_is_swept(tmp_path):
    """Of processes of this machine that run no more; not of the living, of other machines, or what others named so."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    machine = temporaries.among()
    dead = [f".tmp-{machine}-{child.pid}-model", f".tmp-{machine}-{child.pid}-tokens.safetensors"]
    kept = [
        f".tmp-{machine}-{os.getpid()}-model", f".tmp-{machine}-{os.getppid()}-model", f".tmp-00000000-{child.pid}-model",
        ".tmp-mine", "model", f".tmp-{child.pid}-model",
    ]  # fmt: skip
    folder_with(tmp_path / dead[0], a="x")
    (tmp_path / dead[1]).write_text("x")
    for name in kept:
        folder_with(tmp_path / name, a="x")
    files.sweep(tmp_path, "model")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, dead[1]}
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    files.sweep(tmp_path / "nowhere")


def test_what_others_left_is_swept_when_it_is_a_day_old(tmp_path):
    """Of another machine, or of another container on this one, whose processes cannot be seen from here."""
    fresh, old = (tmp_path / f".tmp-0000000{digit}-1-out.json" for digit in range(2))
    for path in (fresh, old):
        path.write_text("x")
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_numbers_that_no_process_has_stop_no_writer(tmp_path):
    """2^31 and above is none to the system at all; such a name is nobody's."""
    stray = tmp_path / f"{files.TEMPORARY}{temporaries.among()}-{1 << 31}-out.json"
    stray.write_text("x")
    with files.replacing(tmp_path / "out.json") as temporary:
        files.write_json(temporary, {})
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", stray.name}


@pytest.mark.parametrize("write", ["replacing", "temporary_beside"])
def test_who_writes_under_a_name_sweeps_what_the_dead_left_of_it(tmp_path, write):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    half = tmp_path / f"{files.TEMPORARY}{temporaries.among()}-{child.pid}-out.json"
    half.write_text('{"fo')
    if write == "replacing":
        with files.replacing(tmp_path / "out.json") as temporary:
            files.write_json(temporary, {})
        assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    else:
        files.temporary_beside(tmp_path / "out.json")
        assert not list(tmp_path.iterdir())


def test_a_kill_at_the_first_mark_leaves_a_folder_that_can_be_used(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    half = tmp_path / f"{files.TEMPORARY}{temporaries.among()}-{child.pid}-{files.MARK}"
    half.write_text('{"fo')
    files.check_ours(tmp_path, "training run")
    files.claim(tmp_path, "training run")
    assert files.made_as(tmp_path) == "training run" and not half.exists()
    other = folder_with(tmp_path / "other", mine="x")
    (other / half.name).write_text("x")
    with pytest.raises(OutputError, match="it holds mine"):
        files.check_ours(other, "training run")


@pytest.mark.parametrize("name", [".", "", "/", ".."])
def test_folders_without_a_name_of_their_own(tmp_path, monkeypatch, name):
    folder_with(tmp_path / "here", mine="x")
    monkeypatch.chdir(tmp_path / "here")
    files.recover_folder(Path(name))
    with pytest.raises(OutputError, match="neither empty nor"):
        files.check_ours(Path(name), "training run")


def test_what_is_tried_for_a_moment_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match="No space"):
        files.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def hold(folder, ready, done):
    with files.locked(folder, "a run"):
        ready.set()
        done.wait()


def test_one_process_writes_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(PATIENCE)
    with pytest.raises(OutputError, match="another process is writing a run") as told, files.locked(tmp_path, "a run"):
        pass
    assert f"process {other.pid}" in told.value.value
    other.kill()  # a lock ends with its process
    other.join()
    with files.locked(tmp_path, "a run"):
        pass
    with files.locked(tmp_path, "a run"):
        pass


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such name")
def test_a_path_that_tensors_could_not_be_read_from_again_is_refused_before_anything_is_there(tmp_path):
    """safetensors writes below a path that is not valid UTF-8, and then refuses to read what it wrote."""
    folder = tmp_path / "\udcff"
    with pytest.raises(OutputError, match="not valid UTF-8"):
        files.claim(folder, "training run")
    with pytest.raises(OutputError, match="not valid UTF-8"):
        files.write_tensors(folder / "z.safetensors", {"z": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
