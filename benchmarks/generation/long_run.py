"""A long run of the command line: is its memory steady, and does a run that is killed and continued give the same file?

    python -m benchmarks.generation.long_run [--shape 4x256] [--latents 100000] [--batch 256] [--workers 1] [--kills 8]

`lmvae-fast generate --prior N --sample --top-p 0.9 --output ...` decodes N latents on a random model, once undisturbed and once
under SIGKILLs at random moments, each followed by the same command again. The resident memory of the processes is read four
times a second. Writes benchmarks/results/generation/long_run.json; ends with 1 if the two files differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import records
from benchmarks.common.cases import make_case
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.profiling.measure import machine

RESULTS = records.RESULTS / "generation"


class Run:
    """The command in a process group of its own, with samples of it: seconds, bytes written, resident bytes."""

    def __init__(self, model: Path, output: Path, options: argparse.Namespace) -> None:
        command = [
            sys.executable, "-m", "lmvae_fast.cli", "generate", str(model), "--prior", str(options.latents), "--output",
            str(output), "--batch-size", str(options.batch), "--sample", "--top-p", "0.9", "--seed", "0", "--workers",
            str(options.workers), "--json",
        ]  # fmt: skip
        self.output, self.start = output, time.perf_counter()
        self.samples: list[tuple[float, int, int]] = []
        self.log = output.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self.log, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip

    def wait(self, seconds: float | None = None, every: float = 0.25) -> bool:
        """Watch until it ends (True; RuntimeError if it failed), or kill it with all its processes after so long (False)."""
        while self.process.poll() is None:
            elapsed = time.perf_counter() - self.start
            if seconds is not None and elapsed >= seconds:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                return False
            written = self.output.stat().st_size if self.output.exists() else 0
            self.samples.append((elapsed, written, _resident_bytes(self.process.pid)))
            time.sleep(every if seconds is None else min(every, seconds - elapsed))
        self.log.close()
        if self.process.returncode:
            raise RuntimeError(self.output.with_suffix(".log").read_text()[-3000:])
        return True


def _resident_bytes(group: int) -> int:
    """Resident memory of every process of a group that is its session's."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[2]) == group:  # process group; the resident set follows in pages
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def memory(run: Run) -> dict[str, Any]:
    """Resident memory behind the first tenth of the file and at its end: medians and peaks of a tenth each, and the slope.

    Within a block memory rises and falls with the rows that are decoded; medians of many blocks compare.
    """
    size = run.output.stat().st_size
    samples = [(written / size, held) for _, written, held in run.samples if held]
    second, last = ([held for share, held in samples if low <= share <= low + 0.1] for low in (0.1, 0.9))
    if not second or not last:
        raise RuntimeError(f"the run was over before its memory could be seen: {len(samples)} samples")
    slope = statistics.linear_regression(*zip(*(sample for sample in samples if sample[0] >= 0.1), strict=True)).slope
    return {
        "after_a_tenth": {"median_bytes": statistics.median(second), "peak_bytes": max(second), "samples": len(second)},
        "at_the_end": {"median_bytes": statistics.median(last), "peak_bytes": max(last), "samples": len(last)},
        "growth_bytes_over_the_run": round(slope), "peak_bytes": max(held for _, held in samples),
        "curve": [[round(share, 4), held] for share, held in samples[:: max(len(samples) // 200, 1)]],
    }  # fmt: skip


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """A random model of the shape; its checkpoint."""
    lines = generate_corpus(num_sentences=2000).texts
    return Path(json.loads(make_case(folder, options.shape, lines, 1, options.threads).read_text())["checkpoint"])


def killed_and_continued(model: Path, output: Path, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs under SIGKILL at random moments until the file is whole; ``seconds``: what an undisturbed run takes.

    Where one ends before it has been killed as often as asked (the machine is less busy than it was), the file is begun
    anew with half the seconds.
    """
    moments, kills, in_mid_file = random.Random(options.seed), [], 0
    while len(kills) < options.kills:
        # cut short on average by its share of the whole: some die while they load, some in mid-file
        run = Run(model, output, options)
        if run.wait(moments.uniform(0.0, 2 * seconds / (options.kills + 1))):
            output.unlink()
            output.with_name(output.name + ".meta.json").unlink()
            seconds, kills, in_mid_file = seconds / 2, [], 0
            continue
        kills.append(round(run.samples[-1][0], 1) if run.samples else 0.0)
        in_mid_file += output.exists() and output.stat().st_size > 0
    Run(model, output, options).wait()
    return {"kills_after_seconds": kills, "kills_in_mid_file": in_mid_file}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run both and compare their files."""
    model = make_model(folder, options)
    whole = Run(model, folder / "whole.jsonl", options)
    whole.wait()
    seconds = time.perf_counter() - whole.start
    output = folder / "killed.jsonl"
    kills = killed_and_continued(model, output, options, seconds)
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole.output, output)]
    return {
        "latents": options.latents, "lines": whole.output.read_bytes().count(b"\n"), "file_bytes": whole.output.stat().st_size,
        "seconds": round(seconds, 1), "memory": memory(whole), **kills, "identical": files[0] == files[1], "sha256": files,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x256")
    parser.add_argument("--latents", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    record = {"command": " ".join(["python -m benchmarks.generation.long_run", *sys.argv[1:]]), "shape": options.shape,
              "batch": options.batch, "workers": options.workers, "machine": machine("cpu"), **result}  # fmt: skip
    records.write(record, RESULTS / "long_run.json")
    first, last = (result["memory"][name]["median_bytes"] / 1e6 for name in ("after_a_tenth", "at_the_end"))
    print(f"{first:.1f} MB after a tenth, {last:.1f} MB at the end; {len(result['kills_after_seconds'])} kills, files "
          f"{'identical' if result['identical'] else 'DIFFER'}")  # fmt: skip
    sys.exit(not result["identical"])


if __name__ == "__main__":
    main()
