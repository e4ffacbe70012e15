"""Up to how many rows `packed_linear` is the fastest product here: a table by instruction set, measured and not guessed.

`python -m benchmarks.kernels.crossover --write` measures the machine it runs on and enters it in `choices.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import backend

TABLE = Path(__file__).with_name("choices.json")
_BATCH = 512  # rows of a training batch, or so
LADDER = ("default", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")  # each has what stands before it


def _known() -> bool:
    """Whether there is an extension, and not one that was built before it could say what it uses."""
    return backend.extension()[0] and hasattr(torch.ops.lmvae_fast, "cpu_extension")


def instruction_set() -> str:
    """The best of `LADDER` that the extension uses here."""
    return torch.ops.lmvae_fast.cpu_extension()


@cache
def most_rows(dtype: torch.dtype = torch.float32) -> int:
    """Rows up to which `packed_linear` in this dtype is the fastest product of this machine's CPU; 0 where it has none.

    An instruction set that nobody has measured is given what the next one below it has.
    """
    if not _known():
        return 0
    return rows_of(table(), instruction_set(), str(dtype).removeprefix("torch."))


def table() -> dict[str, dict[str, Any]]:
    """By instruction set, as they were measured: rows by dtype, and what multiplies a training batch ("float32 training")."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def rows_of(table: dict[str, dict[str, Any]], best: str, dtype: str) -> int:
    """Rows of the instruction set nearest to ``best``, from there down `LADDER`, that ``table`` has for ``dtype``; else 0."""
    return nearest(table, best, dtype) or 0


def nearest(table: dict[str, dict[str, Any]], best: str, entry: str) -> Any:
    """An entry of the instruction set nearest to ``best``, from there down `LADDER`, that has it; else None."""
    for name in reversed(LADDER[: LADDER.index(best) + 1]):
        if entry in table.get(name, {}):
            return table[name][entry]
    return None


@cache
def training_product(dtype: torch.dtype = torch.float32) -> str:
    """The fastest product of a training batch's rows with a weight that stays: "onednn" (prepared by it), "packed" (ours), or
    "plain" where nothing can be prepared. A table by instruction set, as for `most_rows`."""
    name = str(dtype).removeprefix("torch.")
    if _known():
        here = table().get(instruction_set(), {})
        # Where no batch was measured, but rows were: ours is the fastest product of as many rows.
        many = f"{name} training" not in here and here.get(name, 0) >= _BATCH
        if many or nearest(table(), instruction_set(), f"{name} training") == "packed":
            return "packed"
    prepares = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    if prepares:
        return "onednn"
    return "packed" if most_rows(dtype) >= _BATCH else "plain"


def bodies() -> list[dict[str, str]]:
    """What multiplies by packed weights in decoding on this CPU, a line for each precision: ``weights``, ``rows`` (as text),
    ``by`` (the kernel) and ``reason`` (why not a faster one); no lines without the C++ extension."""
    if not _known():
        return []
    rung = LADDER.index(instruction_set())

    def has(name: str) -> bool:
        return rung >= LADDER.index(name)

    vectors = f"{LADDER[min(rung, 2)]} vectors"
    half = (
        ("AMX tiles, below 5 rows AVX512-BF16 dot products", "the fastest there is")
        if has("amx")
        else ("AVX512-BF16 dot products", "no AMX")
        if has("avx512_bf16")
        else (f"{vectors}, weights widened", "no AVX512-BF16")
    )
    whole = (
        ("AMX tiles from 25 rows, vectors below", "the fastest there is") if has("amx") else (vectors, "no AMX tiles")
    )
    bytes_ = (
        (f"AMX tiles for bf16 decoders (below 5 rows AVX512-VNNI), {vectors} for fp32", 'only with weights="int8"')
        if has("amx")
        else (f"AVX512-VNNI dot products for bf16 decoders, {vectors} for fp32", 'only with weights="int8"')
        if has("avx512_vnni")
        else (f"{vectors}, weights widened", 'no AVX512-VNNI; only with weights="int8"')
    )
    fp32, bf16 = (f"up to {most_rows(dtype)}" for dtype in (torch.float32, torch.bfloat16))
    lines = (("float32", fp32, *whole), ("bfloat16", bf16, *half), ("int8", "any", *bytes_))
    return [dict(zip(("weights", "rows", "by", "reason"), line, strict=True)) for line in lines]


def training_bodies() -> list[dict[str, str]]:
    """What multiplies by a frozen decoder's weights in training on this CPU, a line for each precision: ``weights``, ``by`` and
    ``reason``; no lines without the C++ extension."""
    if not _known():
        return []
    here = instruction_set()
    named = {
        "onednn": ("oneDNN, both passes' weights prepared once", "the fastest measured"),
        "packed": ("packed_linear, both passes' weights prepared once", "the fastest measured"),
        "plain": ("torch", "oneDNN has no product for it here"),
    }
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        by, reason = named[training_product(dtype)]
        if f"{name} training" not in table().get(here, {}):
            reason = f"not measured on {here}, taken from the nearest that was" if by != "plain" else reason
        lines.append({"weights": name, "by": by, "reason": reason})
    return lines
