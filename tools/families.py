"""Every model type that transformers maps, as a tiny random model, against its own eager code: `make families`.

    python tools/families.py decoders|encoders [--types NAME ...] [--jobs 2] [--seconds 60] [--json] [--dry-run]

Each type runs in a process of its own, forked after the imports, with a time limit. The record goes to
benchmarks/results/families/, the table to docs/decoders.md or docs/encoders.md (not with --types or --dry-run). The exit code
is 1 where a type that was accepted computes something else than the model itself, or a check could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # also where this file is run by its path

import torch  # noqa: E402
import transformers  # noqa: E402
from family_pages import decoders_page, encoders_page  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.common import records  # noqa: E402
from lmvae_fast.errors import LMVAEError  # noqa: E402
from lmvae_fast.kernels.latent_attention.visibility import VISIBILITIES  # noqa: E402
from lmvae_fast.profiling.measure import machine  # noqa: E402
from lmvae_fast.testing import family_check, mapped_types  # noqa: E402

Result = dict[str, Any]
WIDE = 64  # a window that no sentence of the check reaches past


def check_decoder_type(model_type: str) -> Result:
    """What became of a causal model type: status right, refused, wrong or unbuilt; figures, and the reason."""
    try:
        model = mapped_types.tiny_model(model_type)
    except Exception as error:
        return {"status": "unbuilt", "reason": _line(error)}
    result: Result = {"class": type(model).__name__}
    try:
        found = family_check.check_decoder(model)
        if all(isinstance(found[visibility], str) for visibility in VISIBILITIES):
            found = family_check.check_decoder(mapped_types.tiny_model(model_type, window=WIDE))
            found["within_window"] = "all"
        elif isinstance(found.get("rolling"), str):
            wide = family_check.check_decoder(mapped_types.tiny_model(model_type, window=WIDE), gradients=False)
            found["rolling_within_window"] = wide["rolling"]
    except LMVAEError as error:
        return {**result, "status": "refused", "reason": _reason(error)}
    off = family_check.wrong(found)
    return {**result, "status": "wrong" if off else "right", "reason": ", ".join(off), "figures": found}


def check_encoder_type(model_type: str) -> Result:
    """What became of a text encoder type: as `check_decoder_type`."""
    from lmvae_fast.testing import encoder_check

    return encoder_check.check_type(model_type)


def _reason(error: LMVAEError) -> str:
    parts = [error.problem] + ([f"({error.value})"] if error.value is not None else [])
    return " ".join(parts)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[-1].strip()[:200]}"


def run(types: list[str], check: Callable[[str], Result], jobs: int, seconds: int) -> Iterator[tuple[str, Result]]:
    """Results as they come, each of a forked process that is killed past its time."""
    waiting, running = list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running.update([_started(name, check)])
        ready, _, _ = select.select(list(running), [], [], 0.5)
        for pipe in list(running):
            name, pid, began, chunks = running[pipe]
            late = time.monotonic() - began > seconds
            if pipe in ready and (data := os.read(pipe, 1 << 16)):
                chunks.append(data)
                continue
            if pipe not in ready and not late:
                continue
            if late:
                os.kill(pid, signal.SIGKILL)
            os.close(pipe)
            _, status = os.waitpid(pid, 0)
            del running[pipe]
            result = json.loads(b"".join(chunks)) if chunks and not late else {"status": "unmeasured"}
            if result["status"] == "unmeasured":
                result["reason"] = f"took more than {seconds} s" if late else f"the process ended with status {status}"
            yield name, {**result, "seconds": round(time.monotonic() - began, 1)}


def _started(name: str, check: Callable[[str], Result]) -> tuple[int, tuple[str, int, float, list[bytes]]]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            try:
                result = check(name)
            except BaseException as error:
                result = {"status": "unmeasured", "reason": _line(error)}
            os.write(write, json.dumps(result, default=str).encode())
        finally:
            os._exit(0)
    os.close(write)
    return read, (name, pid, time.monotonic(), [])


def main() -> int:
    """Run, record, write the page; 1 for a wrong or unmeasured type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("decoders", "encoders"))
    parser.add_argument("--types", nargs="*", default=None, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    decoders = options.kind == "decoders"
    known = mapped_types.mapped_types() if decoders else mapped_types.encoder_types()
    check = check_decoder_type if decoders else check_encoder_type
    types = options.types if options.types is not None else known
    began, results = time.monotonic(), {}
    with tqdm(total=len(types), unit="type", desc=options.kind, disable=options.json) as bar:
        for name, result in run(types, check, options.jobs, options.seconds):
            results[name] = result
            bar.update()
            if options.types is not None and not options.json:
                tqdm.write(f"{name}: {json.dumps(result)}")
    count = {status: sum(r["status"] == status for r in results.values()) for status in STATUSES}
    record = {
        "benchmark": f"families/{options.kind}", "machine": machine("cpu"), "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - began, 1), "jobs": options.jobs, "tolerance": family_check.TOLERANCE,
        "count": count, "types": dict(sorted(results.items())),
    }  # fmt: skip
    if options.types is None and not options.dry_run:
        records.write(record, records.RESULTS / "families" / f"{options.kind}.json")
        page = decoders_page(record) if decoders else encoders_page(record)
        (ROOT / "docs" / f"{options.kind}.md").write_text(page)
    print(json.dumps(record) if options.json else f"{count} in {record['seconds']} s")
    return int(count["wrong"] + count["unmeasured"] > 0)


STATUSES = ("right", "refused", "wrong", "unbuilt", "unmeasured")

if __name__ == "__main__":
    sys.exit(main())
