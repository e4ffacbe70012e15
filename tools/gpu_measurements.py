"""The stages of `gpu_check.py` that measure: kernels, both loops, counters."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_stages import ROOT, Context, find, skipped, verdict


def benchmarks(context: Context, seconds: float) -> dict[str, Any]:
    if context.dry:
        return skipped("dry run")
    ops = sorted(p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks" / "kernels").glob("bench_*.py"))
    junit, folder = context.output / "tests.xml", context.scratch / "kernels"
    finish, result = time.monotonic() + seconds, {}
    for i, op in enumerate(ops):
        share = (finish - time.monotonic()) / (len(ops) - i)
        command = [sys.executable, "-m", "benchmarks.kernels.run", op, "--device", "cuda", "--output", str(folder)]
        command += ["--seconds", "0.4", "--compile-seconds", str(round(share / 2)), "--threads", "4"]
        command += ["--junit", str(junit)] if junit.exists() else []
        done = context.run(command, share, LMVAE_COMMIT=context.commit)
        record = folder / f"{op}_cuda.json"
        rows = len(json.loads(record.read_text())["cases"]) if record.exists() else 0
        result[op] = {"status": verdict(done), "rows": rows, **({} if done.code == 0 else {"tail": done.tail[-800:]})}
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*_cuda.json"))}
    (context.output / "benchmarks.json").write_text(json.dumps(records, indent=1) + "\n")
    (context.output / "benchmarks.md").write_text("\n".join(p.read_text() for p in sorted(folder.glob("*_cuda.md"))))
    whole = all(r["status"] == "ok" for r in result.values())
    return {"status": "ok" if whole else "partial", "ops": result}


def end_to_end(context: Context, seconds: float) -> dict[str, Any]:
    if context.dry:
        return skipped("dry run")
    output = context.output / "end_to_end.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.training.end_to_end",
        "--device",
        "cuda",
        "--seconds",
        "3",
        "--output",
        str(output),
    ]
    done = context.run(command, seconds, LMVAE_COMMIT=context.commit)
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    expected = []
    if rows:
        card = "h200" if "H200" in context.device else "h100"
        command = [sys.executable, "-m", "benchmarks.roofline", "--device", card, "--measured", str(output)]
        told = context.run(command, 30)
        expected = told.tail.strip().splitlines() if told.code == 0 else []
    return {
        "status": verdict(done),
        "rows": rows,
        "expected": expected,
        **({} if done.code == 0 else {"tail": done.tail[-1500:]}),
    }


def loop(name: str) -> Callable[[Context, float], dict[str, Any]]:
    """A stage that measures a loop as it is used: `benchmarks.loops train` or `decode`."""

    def run(context: Context, seconds: float) -> dict[str, Any]:
        if context.dry:
            return skipped("dry run")
        output = context.output / f"loops_{name}.json"
        command = [sys.executable, "-m", "benchmarks.loops", name, "--device", "cuda", "--output", str(output)]
        share = 0.6 if name == "decode" else 1.0  # the rest is for its variants
        done = context.run(command, share * seconds, LMVAE_COMMIT=context.commit)
        rows = json.loads(output.read_text())["rows"] if output.exists() else []
        rows += _variants(context, 0.2 * seconds) if name == "decode" and done.code == 0 else []
        return {"status": verdict(done), "rows": rows, **({} if done.code == 0 else {"tail": done.tail[-1500:]})}

    return run


def _variants(context: Context, seconds: float) -> list[dict[str, Any]]:
    """Rows of decoding at batch 1 by the other ways of its products, each in a process of its own."""
    rows = []
    for way in ("waiting", "off"):
        output = context.output / f"loops_decode_{way}.json"
        given = ["decode", "--device", "cuda", "--batches", "1", "--seconds", "0.5", "--output"]
        command = [sys.executable, "-m", "benchmarks.loops", *given, str(output)]
        done = context.run(command, seconds, LMVAE_COMMIT=context.commit, LMVAE_ROW_PRODUCT=way)
        made = json.loads(output.read_text())["rows"] if done.code == 0 and output.exists() else []
        rows += [{**row, "row_product": way} for row in made] or [{"row_product": way, "status": verdict(done)}]
    return rows


#: What Nsight Compute counts, and of which kernels.
_COUNTED = ("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
            "launch__registers_per_thread")  # fmt: skip
_LOOKED_AT = "regex:latent_kv|latent_attention|lm_head"


def counters(context: Context, seconds: float) -> dict[str, Any]:
    """Counters of three kernels in a training step; skipped where Nsight Compute is absent or may not count."""
    program = find("ncu")
    if context.dry or program is None:
        return skipped("dry run" if context.dry else "ncu is not installed")
    work = [sys.executable, "-m", "benchmarks.loops", "train", "--device", "cuda", "--batches", "32", "--steps", "4",
            "--output", str(context.scratch / "counted.json")]  # fmt: skip
    command = [program, "--csv", "--metrics", ",".join(_COUNTED), "--kernel-name", _LOOKED_AT, "--launch-count", "24"]
    done = context.run([*command, *work], seconds)
    lines = [line for line in done.tail.splitlines() if line.startswith('"')]
    (context.output / "counters.csv").write_text("\n".join(lines) + "\n")
    if not lines:
        return {**skipped("ncu counted nothing (it may need the right to read counters)"), "tail": done.tail[-800:]}
    return {"status": "ok" if done.code == 0 else "partial", "lines": len(lines)}
