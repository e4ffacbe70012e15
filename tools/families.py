"""Every model type that transformers maps, as a tiny random model, against its own eager code: `make families`.

    python tools/families.py decoders encoders [--types NAME ...] [--jobs 2] [--seconds 60] [--json] [--dry-run]

Each type runs in a process of its own, forked after the imports, with a time limit; with the decoders also every variant of
rotation and window of `lmvae_fast/testing/variants.py` (named ``llama:yarn``). The record goes to benchmarks/results/families/,
the table to docs/decoders.md or docs/encoders.md (not with --types or --dry-run).

What may become of a type: *right*; *refused* for a reason about the model; *absent*, where it cannot be built here for a reason
that is stated. The exit code is 1 where one is *wrong* (accepted, and computes something else than the model itself),
*unexplained* (refused by an error from inside a library) or *unmeasured*.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
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
from lmvae_fast.testing import encoder_check, family_check, mapped_types, tiny_tokenizer  # noqa: E402
from lmvae_fast.testing.variants import check_variant, variants  # noqa: E402

Result = dict[str, Any]
WIDE = 64  # a window that no sentence of the check reaches past


def check_decoder_type(name: str) -> Result:
    """What became of a causal model type or variant: status, figures, and the reason."""
    if ":" in name:
        return _explained(check_variant, name)
    try:
        model = mapped_types.tiny_model(name)
    except Exception as error:
        return _not_built(name, error)
    return {"class": type(model).__name__, **_explained(_checked, name, model)}


def _checked(name: str, model: Any) -> Result:
    found = family_check.check_decoder(model)
    if all(isinstance(found[visibility], str) for visibility in VISIBILITIES):
        found = family_check.check_decoder(mapped_types.tiny_model(name, window=WIDE))
        found["within_window"] = "all"
    elif isinstance(found.get("rolling"), str):
        wide = family_check.check_decoder(mapped_types.tiny_model(name, window=WIDE), gradients=False)
        found["rolling_within_window"] = wide["rolling"]
    off = family_check.wrong(found)
    return {"status": "wrong" if off else "right", "reason": ", ".join(off), "figures": found}


def check_encoder_type(name: str) -> Result:
    """What became of a text encoder type: as `check_decoder_type`."""
    tokenizer = tiny_tokenizer()
    try:
        model = mapped_types.tiny_encoder_of(name, len(tokenizer))
    except Exception as error:
        return _not_built(name, error)
    return {"class": type(model).__name__, **_explained(encoder_check.check_encoder, model, tokenizer)}


def _explained(check: Callable[..., Result], *given: Any) -> Result:
    """The result of a check, or the refusal that it met; one without a reason of its own is unexplained."""
    try:
        return check(*given)
    except LMVAEError as error:
        reason = " ".join([error.problem] + ([f"({error.value})"] if error.value is not None else []))
        return {"status": "unexplained" if "cannot be run" in error.problem else "refused", "reason": reason}


def _not_built(name: str, error: Exception) -> Result:
    reason = mapped_types.ABSENT.get(name)
    if reason is None and isinstance(error, ImportError):
        package = re.search(r"pip install ([\w.-]+)", str(error))
        reason = f"needs a package that is not installed ({package[1] if package else _line(error)[:80]})"
    return {"status": "unmeasured" if reason is None else "absent", "reason": reason or _line(error)}


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[-1].strip()[:200]}"


def run(types: list[str], check: Callable[[str], Result], jobs: int, seconds: int) -> Iterator[tuple[str, Result]]:
    """Results as they come, each of a forked process that may use ``seconds`` of processor time, and ten times as long."""
    waiting, running = list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running.update([_started(name, check, seconds)])
        ready, _, _ = select.select(list(running), [], [], 0.5)
        for pipe in list(running):
            name, pid, began, chunks = running[pipe]
            late = time.monotonic() - began > 10 * seconds
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
            if "reason" not in result:
                late = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
                result["reason"] = f"took more than {seconds} s" if late else f"the process ended with status {status}"
            yield name, {**result, "seconds": round(time.monotonic() - began, 1)}


def _started(
    name: str, check: Callable[[str], Result], seconds: int
) -> tuple[int, tuple[str, int, float, list[bytes]]]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            try:
                result = check(name)
            except BaseException as error:
                result = {"status": "unmeasured", "reason": _line(error)}
            os.write(write, json.dumps(result, default=str).encode())
        finally:
            os._exit(0)
    os.close(write)
    return read, (name, pid, time.monotonic(), [])


def main(arguments: list[str] | None = None) -> int:
    """Run, record, write the pages; 1 for a failure of any kind asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=("decoders", "encoders"))
    parser.add_argument(
        "--types", nargs="*", default=None, metavar="NAME", help="of one kind; ``llama:yarn`` is a variant"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=60, help="of processor time a type may take")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    failed = [_examined(kind, options) for kind in options.kinds]
    return int(any(failed))


def _examined(kind: str, options: argparse.Namespace) -> bool:
    """Examine the types of one kind; whether one failed."""
    decoders = kind == "decoders"
    known = [*mapped_types.mapped_types(), *variants()] if decoders else mapped_types.encoder_types()
    check = check_decoder_type if decoders else check_encoder_type
    types = options.types if options.types is not None else known
    began, results = (time.monotonic(), _cpu_seconds()), {}
    with tqdm(total=len(types), unit="type", desc=kind, disable=options.json) as bar:
        for name, result in run(types, check, options.jobs, options.seconds):
            results[name] = result
            bar.update()
            if options.types is not None and not options.json:
                tqdm.write(f"{name}: {json.dumps(result)}")
    found = dict(sorted(results.items()))
    varied = {name: found.pop(name) for name in list(found) if ":" in name}
    record = {
        "benchmark": f"families/{kind}", "machine": machine("cpu"), "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - began[0], 1), "cpu_seconds": round(_cpu_seconds() - began[1], 1),
        "jobs": options.jobs, "tolerance": family_check.TOLERANCE, "count": _counted(found), "types": found,
    }  # fmt: skip
    if varied:
        record |= {"variant_count": _counted(varied), "variants": varied}
    if options.types is None and not options.dry_run:
        records.write(record, records.RESULTS / "families" / f"{kind}.json")
        page = decoders_page(record) if decoders else encoders_page(record)
        (ROOT / "docs" / f"{kind}.md").write_text(page)
    failed = {name: result for name, result in results.items() if result["status"] in FAILURES}
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{kind}: {record['count']}, variants {record.get('variant_count')} in {record['seconds']} s")
        print("".join(f"{name}: {result['status']}: {result['reason']}\n" for name, result in failed.items()), end="")
    return bool(failed)


def _counted(results: dict[str, Result]) -> dict[str, int]:
    return {status: sum(result["status"] == status for result in results.values()) for status in STATUSES}


def _cpu_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


FAILURES = ("wrong", "unexplained", "unmeasured")
STATUSES = ("right", "refused", "absent", *FAILURES)

if __name__ == "__main__":
    sys.exit(main())
