"""The versions that must work, each tried in an environment of its own: `make test-matrix`.

    python tools/test_matrix.py [ROW ...] [--minutes 40] [--every 8] [--download] [--keep] [--reuse] [--no-build]
        [--tests PATH ...] [--folder .venv-matrix] [--record FILE]

A row is a Python with a torch and a transformers. Each gets a virtual environment below --folder, a copy of this tree with
the C++ extension built against its torch (this tree's, where that was built for the same torch: nothing in it depends on
Python; with --no-build none). Then all tests are collected, which imports everything, and every eighth of those of the
kernels (C++ and reference), models, training, generation, data and command line runs, beginning with another one in each row
(--every 1 runs them all): a few minutes of two cores. Rows that cannot be tried here say why: no such Python on the machine,
or packages that pip cannot get, or (without --download) would have to get over the network in an amount that is more than a
run of tests should take.

The last lines name every row with what came of it, and FOLDER/results.json has the same; --record FILE puts the rows that
were tried into a record that docs/compatibility.md is made of (python -m benchmarks.report). The exit code is 1 when a row that
was tried is red, 2 when none could be tried, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1 << 29  # bytes of one package that pip may fetch without --download
TESTS = (
    "tests/kernels", "tests/models", "tests/text", "tests/data", "tests/training", "tests/generation", "tests/evaluation",
    "tests/cli",
)  # fmt: skip
EVERY = 8
# Triton's interpreter is the same code under every version here and takes most of the kernels' time.
CHOSEN = "not triton"
# What the chosen tests need beside the package's own requirements.
TOOLS = ("pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "scikit-learn>=1.4", "matplotlib>=3.8", "peft>=0.17",
         "tensorboard>=2.16", "FrEIA>=0.2", "psutil>=5.9", "ninja>=1.11")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Versions to try; an empty requirement takes the newest that pip finds."""

    name: str
    python: str
    torch: str = "torch"
    transformers: str = "transformers"


ROWS = (
    Row("oldest", "3.10", "torch==2.11.*", "transformers==5.10.*"),
    Row("python-3.10", "3.10"),
    Row("h200", "3.12", "torch==2.11.*", "transformers==5.17.*"),
    Row("python-3.13", "3.13"),
    Row("newest-transformers", "3.11", "torch==2.13.*"),
    Row("newest", "3.11"),
)


@dataclass
class Outcome:
    """What came of a row: passed, failed, or not run with the reason."""

    row: str
    status: str
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    tests: int = 0
    of: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """One line for a person."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        said = (
            f"{self.tests} of {self.of} tests, {len(self.failed)} failed" if self.status != "not run" else self.reason
        )
        return f"{self.row:20} {self.status:8} {said}" + (f" ({versions})" if versions else "")


class CannotTry(Exception):
    """Why a row cannot be tried on this machine."""


def find_python(version: str) -> str:
    """An interpreter of a version such as 3.13; CannotTry where the machine has none."""
    places = sorted(
        Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob(f"versions/{version}.*/bin/python")
    )
    found = shutil.which(f"python{version}")
    for candidate in (sys.executable, *map(str, reversed(places)), *([found] if found else [])):
        code = "import sys, venv, ensurepip; print('{}.{}'.format(*sys.version_info))"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    raise CannotTry(f"there is no Python {version} on this machine")


def run(command: Sequence[object], log: Path, deadline: float, where: Path = ROOT, **environment: str) -> int:
    """Exit status of a command whose output goes to a file; CannotTry when its time is up."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        file.flush()
        try:
            return subprocess.run(
                [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                timeout=max(deadline - time.monotonic(), 1), env={**os.environ, **environment}, cwd=where,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            names = " ".join(Path(str(part)).name for part in command)  # no paths: this stands in a record
            raise CannotTry(f"time was up during: {names[:100]} (see {log})") from None


def fetched_bytes(report: Path) -> dict[str, int]:
    """Bytes by package that pip would have to fetch over the network: what it lists and does not find on this disk."""
    from urllib.request import Request, urlopen

    sizes = {}
    for item in json.loads(report.read_text())["install"]:
        address = item["download_info"]["url"]
        if not address.startswith("file:"):
            with urlopen(Request(address, method="HEAD"), timeout=60) as answer:
                sizes[item["metadata"]["name"]] = int(answer.headers.get("Content-Length") or 0)
    return sizes


def install(row: Row, venv: Path, log: Path, deadline: float, download: bool) -> Path:
    """The environment's Python, with all packages; CannotTry names what could not be had."""
    python = venv / "bin" / "python"
    if run([find_python(row.python), "-m", "venv", "--clear", venv], log, deadline):
        raise CannotTry(f"no virtual environment could be made (see {log})")

    def pip(*arguments: object) -> int:
        return run([python, "-m", "pip", *arguments], log, deadline)

    if pip("install", "--quiet", "--upgrade", "pip", "setuptools>=77", "wheel"):
        raise CannotTry(f"pip could not be brought up to date (see {log})")
    # all at once, so that pip chooses versions that go together; torch's own requirements are the largest part
    wanted = [row.torch, row.transformers, *_requirements(), *TOOLS]
    report = venv / "report.json"
    if pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", report, *wanted):
        raise CannotTry(f"pip finds no packages for {row.torch}, {row.transformers} (see {log})")
    if not download:
        try:
            large = {name: size for name, size in fetched_bytes(report).items() if size > LARGEST}
        except OSError as error:
            raise CannotTry(f"the sizes of packages cannot be asked for: {error}") from error
        if large:
            listed = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in large.items())
            raise CannotTry(f"pip would have to download {listed}: give --download")
    if pip("install", "--quiet", *wanted):
        raise CannotTry(f"pip cannot install {row.torch}, {row.transformers} and what they need (see {log})")
    return python


def _requirements() -> list[str]:
    """The package's own, without the two that a row chooses."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("\ndependencies = [") :].split("\n]", 1)[0]
    return [name for name in re.findall(r'"([^"]+)"', section) if not re.match(r"(torch|transformers)\b", name)]


def copy_tree(folder: Path) -> None:
    """This tree's files, tracked or new, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def built_for() -> str | None:
    """The torch that this tree's C++ extension was built for, or None where there is none."""
    record = ROOT / "lmvae_fast" / "_build_info.json"
    if not record.is_file() or not (ROOT / "lmvae_fast" / "_C.so").is_file():
        return None
    return json.loads(record.read_text()).get("torch")


def try_row(
    row: Row,
    folder: Path,
    minutes: float,
    download: bool,
    jobs: int,
    tests: Sequence[str] = TESTS,
    build: bool = True,
    every: int = 1,
    reuse: bool = False,
) -> Outcome:
    """Install and test one row."""
    started, place = time.monotonic(), folder / row.name
    kept = place / "venv" / "bin" / "python"
    if not (reuse and kept.exists()):
        shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(place / "tree", ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    log, outcome = place / "log.txt", Outcome(row.name, "not run")
    deadline = started + 60 * minutes
    try:
        python = kept if reuse and kept.exists() else install(row, place / "venv", log, deadline, download)
        code = (
            "import importlib.metadata as m, json, platform; print(json.dumps({'Python': platform.python_version()} | "
            "{n: m.version(n) for n in ('torch', 'transformers', 'numpy')}))"
        )
        outcome.versions = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout)
        copy_tree(place / "tree")
        ready = build and built_for() == outcome.versions["torch"]
        built = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        if run(built, log, deadline, place / "tree", LMVAE_BUILD_CSRC="1" if build and not ready else "0"):
            outcome.status, outcome.failed = "failed", [f"the build (see {log})"]
            return outcome
        for name in ("_C.so", "_build_info.json") if ready else ():
            shutil.copy2(ROOT / "lmvae_fast" / name, place / "tree" / "lmvae_fast" / name)
        outcome.versions["C++ extension"] = "this tree's" if ready else "built" if build else "none"
        environment = {
            "OMP_NUM_THREADS": "1",
            "LMVAE_SHARED": os.environ.get("LMVAE_SHARED", str(ROOT.parent / "shared")),
        }
        junit, collected = place / "tests.xml", place / "collected.txt"
        for stale in (junit, collected):
            stale.unlink(missing_ok=True)
        sample = [
            "-p",
            "tools.every_nth",
            "--every",
            every,
            "--first",
            first_test(row, every),
            "--collected",
            collected,
        ]
        command = [python, "-m", "pytest", "-q", "-n", jobs, "-k", CHOSEN, f"--junitxml={junit}", *sample, *tests]
        code = run(command, log, deadline, place / "tree", **environment)
        outcome.of = int(collected.read_text()) if collected.is_file() else 0
        outcome.tests, outcome.failed = counted(junit)
        outcome.status = "passed" if code == 0 and outcome.tests else "failed"
        if outcome.status == "failed" and not outcome.failed:
            outcome.failed = [f"pytest ended with {code} (see {log})"]
    except CannotTry as error:
        outcome.reason = str(error)
    finally:
        outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def first_test(row: Row, every: int) -> int:
    """Each row begins with another test."""
    names = [each.name for each in ROWS]
    return names.index(row.name) % every if row.name in names else 0


def counted(junit: Path) -> tuple[int, list[str]]:
    """Number of tests that ran (skipped ones did not), and the names of the red ones."""
    if not junit.is_file():
        return 0, []
    cases = [case for case in ElementTree.parse(junit).iter("testcase") if case.find("skipped") is None]
    red = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases), [f"{case.get('classname')}::{case.get('name')}" for case in red]


def record(path: Path, outcomes: Sequence[Outcome], every: int) -> None:
    """Put every row that was asked for into a record; rows that it has and that were not asked for stay as they are."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    known = json.loads(path.read_text())["rows"] if path.is_file() else {}
    for each in outcomes:
        if each.reason != "not asked for":
            entry = asdict(each) | {"commit": git.stdout.strip(), "every": every, "machine": platform.platform()}
            entry["reason"] = re.sub(r" \(see [^)]*\)", "", each.reason)  # a path of this machine
            known[each.row] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"rows": {row.name: known[row.name] for row in ROWS if row.name in known}}, indent=1) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--minutes", type=float, default=40, help="for one row, installation included")
    parser.add_argument("--download", action="store_true", help="let pip fetch packages of any size")
    parser.add_argument("--keep", action="store_true", help="keep the environments of rows that passed")
    parser.add_argument("--reuse", action="store_true", help="take the environments that an earlier run left")
    parser.add_argument("--no-build", action="store_true", help="without the C++ extension: the reference alone")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run the tests")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    parser.add_argument("--every", type=int, default=EVERY, help="run each n-th test of those (1: all)")
    parser.add_argument("--record", type=Path, help="record to put the rows into that were tried")
    options = parser.parse_args(arguments)
    unknown = set(options.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    outcomes = []
    for row in ROWS:
        if options.rows and row.name not in options.rows:
            outcomes.append(Outcome(row.name, "not run", "not asked for"))
            continue
        print(f"{row.name}: Python {row.python}, {row.torch}, {row.transformers} ...", flush=True)
        folder = options.folder.absolute()
        limits = (options.minutes, options.download, options.jobs)
        outcomes.append(
            try_row(row, folder, *limits, options.tests, not options.no_build, options.every, options.reuse)
        )
        print(f"  {outcomes[-1].line()}", flush=True)
        if outcomes[-1].status == "passed" and not options.keep:
            shutil.rmtree(options.folder / row.name, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "results.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    if options.record is not None:
        record(options.record, outcomes, options.every)
    print()
    for each in outcomes:
        print(each.line())
        for name in each.failed:
            print(f"    {name}")
    if any(each.status == "failed" for each in outcomes):
        return 1
    return 0 if any(each.status == "passed" for each in outcomes) else 2


if __name__ == "__main__":
    sys.exit(main())
