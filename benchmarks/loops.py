"""Both loops as they are used, on one device: `lf.train` in bf16 and `lf.generate`, with recorded steps and without.

    python -m benchmarks.loops train  [--device cuda] [--batches 32 256] [--steps 60] [--output FILE.json]
    python -m benchmarks.loops decode [--device cuda] [--batches 1 32 256 1024] [--seconds 2]

GPT-2 small's shape with random weights, sentences of 4 to 22 tokens, 33 slots, z of 128. A training row has the time of a step
in the second half of a run, when every common size of batch has been recorded, and one step under torch's profiler: what the
host launched, how long it was at it, and how long the device was busy. `recorded` and `launched` are the same run with
`cuda_graphs` None and False, in turn. A decoding row has the time of a call of `lf.generate` and of each of its steps.
`--tiny` tries the program; on a CPU nothing is recorded. Rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import lmvae_fast as lf
from benchmarks.common.records import RESULTS, write
from benchmarks.training.end_to_end import LATENT, MAX_LEN, SHAPE, build, decoders, sentences
from lmvae_fast.generation.cuda_graphs import capture_for
from lmvae_fast.profiling.measure import machine
from lmvae_fast.training.callbacks import Callback

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 400}
WAYS: dict[str, bool | None] = {"recorded": None, "launched": False}
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_COPIES = ("cudaMemcpyAsync", "cudaMemcpy")


class StepTimes(Callback):
    """Time of the second half of a run's steps, and one step of them under the profiler (its time is left out)."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.first, self.last = device, steps // 2, steps
        self.seconds = 0.0
        self.profiled: dict[str, Any] = {}
        self._since = self._host = 0.0
        self._profiler: Any = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step(self, run: Any) -> None:
        """See Callback."""
        if self._profiler is not None:  # the step before the first one that is timed
            host = time.perf_counter() - self._host
            self._now()
            self._profiler.__exit__(None, None, None)
            self.profiled = {"host_ms": round(1e3 * host, 3), **counts(self._profiler)}
            self._profiler = None
            self._since = self._now()
        if run.step == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profiler = profile(activities=activities)
            self._now()
            self._profiler.__enter__()
            self._host = time.perf_counter()
        if run.step == self.last:
            self.seconds = (self._now() - self._since) / (self.last - self.first - 1)


def counts(profiler: Any) -> dict[str, Any]:
    """What a profiled step launched and copied, and the device's busy time in milliseconds."""
    events = profiler.key_averages()
    launches = {name: sum(e.count for e in events if e.key == name) for name in _LAUNCHES}
    busy = sum(e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return {
        "launches": {name: count for name, count in launches.items() if count},
        "copies": sum(e.count for e in events if e.key in _COPIES),
        "busy_ms": round(busy / 1e3, 3),
    }


def train_rows(options: argparse.Namespace, shape: dict[str, int]) -> Any:
    """A row for each batch size and way."""
    device = torch.device(options.device)
    for batch in options.batches:
        texts = sentences(batch * 16)
        for way, wanted in WAYS.items():
            model, _ = build(options.device, shape)
            watch = StepTimes(device, options.steps)
            with tempfile.TemporaryDirectory() as folder:
                config = lf.TrainConfig(
                    output_dir=folder, max_steps=options.steps, batch_size=batch, precision="bf16", learning_rate=1e-4,
                    tensorboard=False, progress=False, cuda_graphs=wanted, save_every=10**9, log_every=10,
                )  # fmt: skip
                result = lf.train(model, texts, None, config, [watch])
            losses = [round(row["loss"], 3) for row in result.history if row["kind"] == "train"]
            yield {
                "what": "training step", "way": way, "precision": "bf16", "batch": batch, "ms": round(1e3 * watch.seconds, 3),
                "tokens": round(result.tokens / result.step), "profiled": watch.profiled, "losses": losses,
            }  # fmt: skip


def decode_rows(options: argparse.Namespace, shape: dict[str, int]) -> Any:
    """A row for each batch size and way: whole sentences of the greatest length, none ends early."""
    ours, reference = build(options.device, shape)
    model, _ = decoders(ours, reference, None if options.device == "cpu" else torch.bfloat16)
    model.decoder.tokenizer.eos_token_id = -1
    for batch in options.batches:
        z = torch.randn(batch, LATENT, device=options.device)
        ids = {}
        for way, wanted in WAYS.items():
            config = lf.GenerationConfig(batch_size=batch, max_new_tokens=MAX_LEN, cuda_graphs=wanted)
            times: list[float] = []
            while len(times) < 4 or sum(times) < options.seconds:
                started = time.perf_counter()
                ids[way] = [out.ids for out in lf.generate(model, z, config)]
                times.append(time.perf_counter() - started)
            took = statistics.median(times[1:])
            yield {
                "what": "greedy decoding", "way": way, "batch": batch, "tokens": MAX_LEN, "ms": round(1e3 * took, 3),
                "us_a_step": round(1e6 * took / MAX_LEN, 1), "sentences_a_second": round(batch / took, 1),
                "can_record": capture_for(model.decoder, z.device, wanted) is not None,
                "same_tokens": ids[way] == ids["recorded"],
            }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["train", "decode"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--steps", type=int, default=60, help="of a training run; the second half is timed")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a decoding row")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers: to try the program, not to measure")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.batches = options.batches or ([32, 256] if options.loop == "train" else [1, 32, 256, 1024])
    command = " ".join(sys.argv[1:] if arguments is None else arguments)
    shape = TINY if options.tiny else SHAPE
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.loops {command}", "machine": machine(options.device), "shape": shape, "rows": [],
    }  # fmt: skip
    for row in (train_rows if options.loop == "train" else decode_rows)(options, shape):
        record["rows"].append(row)
        print({name: value for name, value in row.items() if name != "losses"}, flush=True)
        write(record, options.output or RESULTS / f"loops_{options.loop}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
