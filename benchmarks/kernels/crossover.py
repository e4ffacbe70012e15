"""Up to how many rows packed_linear is faster than oneDNN's packed product on this machine, by dtype; and which of the two
multiplies a training batch's rows in less time.

    python -m benchmarks.kernels.crossover [--threads 2] [--seconds 2] [--passes 3] [--training] [--write]

Both sides take turns over the matrices of a layer, enough of them to leave none in a cache. All is measured in several passes,
and a ratio is their geometric mean: what shares a core with us takes more from one unit than from another, and comes and
goes within minutes. The number is the greatest of ROWS up to which packed_linear took no more than TIE of oneDNN's time over
the sizes of a layer: where both are level ours is taken, because activations and residuals then need no pass of their own. Of a
training batch (TRAINING_ROWS, both directions) the one that took
less in all is taken: its activations have passes of their own either way. ``--write`` enters both for this machine's
instruction set in kernels/packed_linear/choices.json, which lmvae_fast reads; other instruction sets keep what they have.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.kernels.bench_packed_linear import MATRICES
from lmvae_fast.kernels.packed_linear import choices, pack_weight, packed_linear
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.profiling.measure import interleave, speedup

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
SHAPES = ((768, 2304), (768, 3072), (3072, 768))  # inputs, outputs of GPT-2-small's layers
TIE = 1.03
TRAINING_ROWS = (320, 640, 1280)


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def ratios(
    rows: int,
    dtype: torch.dtype,
    seconds: float,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    matrices: int = MATRICES,
    rounds: int = 9,
) -> list[float]:
    """oneDNN's time over ours, for every shape."""
    found = []
    for inputs, outputs in shapes:
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(matrices)]
        pages, x = LargePages(), torch.randn(rows, inputs).to(dtype)
        packed = [pages.copy(pack_weight(weight)) for weight in weights]
        blocked = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
        sides = {
            "ours": lambda x=x, packed=packed, n=outputs: [packed_linear(x, w, out_features=n) for w in packed],
            "oneDNN": lambda x=x, blocked=blocked: [_onednn(x, w) for w in blocked],
        }
        found.append(speedup(interleave(sides, seconds, "cpu", rounds=rounds), "ours", "oneDNN"))
    return found


def most_rows(measured: Mapping[int, list[float]]) -> int:
    """The greatest number of rows up to which ours is never slower over a layer's shapes than ``TIE`` allows; else 0."""
    best = 0
    for rows, found in sorted(measured.items()):
        if statistics.geometric_mean(found) < 1 / TIE:
            break
        best = rows
    return best


def over_passes(passes: Sequence[Mapping[int, list[float]]]) -> dict[int, list[float]]:
    """Geometric means of the ratios of every pass, for every number of rows and every shape."""
    return {
        rows: [statistics.geometric_mean(shape) for shape in zip(*(one[rows] for one in passes), strict=True)]
        for rows in passes[0]
    }


def training_ratio(dtype: torch.dtype, seconds: float) -> float:
    """oneDNN's time over ours with a training batch's rows: the geometric mean over rows, shapes and directions."""
    both = [*SHAPES, *((outputs, inputs) for inputs, outputs in SHAPES if (outputs, inputs) not in SHAPES)]
    found = [ratio for rows in TRAINING_ROWS for ratio in ratios(rows, dtype, seconds, both, 6, 3)]
    print(f"training {dtype}: oneDNN's time over ours " + ", ".join(f"{ratio:.2f}x" for ratio in found), flush=True)
    return statistics.geometric_mean(found)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and number of rows")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--training", action="store_true", help="measure a training batch alone")
    parser.add_argument("--write", action="store_true", help="enter what was measured in the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    here, found = choices.instruction_set(), {}
    dtypes = [torch.float32, torch.bfloat16]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(f"{here} bfloat16: oneDNN has no product here, so every number of rows is ours")
        found |= {"bfloat16": ROWS[-1], "bfloat16 training": "packed"}
        dtypes.pop()
    few: dict[torch.dtype, list[dict[int, list[float]]]] = {dtype: [] for dtype in dtypes}
    many: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    for _ in range(options.passes):
        for dtype in dtypes:
            measured = {}
            for rows in () if options.training else ROWS:
                measured[rows] = ratios(rows, dtype, options.seconds)
                print(f"{here} {dtype} {rows} rows: " + ", ".join(f"{r:.2f}x" for r in measured[rows]), flush=True)
            few[dtype].append(measured)
            many[dtype].append(training_ratio(dtype, options.seconds / 4))
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if not options.training:
            combined = over_passes(few[dtype])
            for rows, values in combined.items():
                print(f"{here} {name} {rows} rows, all passes: " + ", ".join(f"{r:.2f}x" for r in values))
            found[name] = most_rows(combined)
        found[f"{name} training"] = "packed" if statistics.geometric_mean(many[dtype]) > 1 else "onednn"
    print(f"{here}: {found}")
    if options.write:
        table = choices.table()
        table[here] = table.get(here, {}) | found
        ordered = {name: table[name] for name in choices.LADDER if name in table}
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in ordered.items())
        choices.TABLE.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
