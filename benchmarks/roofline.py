"""What the ops and both loops cost on a GPU by arithmetic: bytes, FLOPs, launches, the time of a perfect kernel, and ours.

    python -m benchmarks.roofline [--device h200] [--json] [--write] [--measured FILE]

Nothing here has been measured. A perfect kernel moves every byte once at the card's bandwidth and multiplies at its rate,
whichever takes longer, and costs one launch. Ours is expected to take what its bytes and FLOPs take at the share of those
limits that its access pattern allows (`Work.share`, a guess that the first card confirms or refutes), and a launch for each
of its kernels. Sizes are GPT-2 small's. `--measured` prints the times of a record of benchmarks.training.end_to_end beside
the expected ones.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.records import ROOT

RECORD = ROOT / "benchmarks" / "results" / "roofline.json"


@dataclass(frozen=True)
class Card:
    """A card's limits: bytes/s of its memory, FLOP/s by kind of product (dense), seconds of a kernel that does nothing.

    launch: on the device, from one kernel of a recorded graph to the next; dependent: to one that may begin while that one
    ends. host_launch: of a kernel that the host launches. Bandwidth and rates are the data sheets'; launches are what such
    cards are known for, rounded up.
    """

    name: str
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float
    launch: float = 1.5e-6
    dependent: float = 0.8e-6
    host_launch: float = 6e-6


FEW = 16  # lmvae_fast.kernels.row_product.MOST_ROWS

CARDS = {
    "h100": Card("H100 SXM", 3.35e12, 989e12, 495e12, 67e12),
    "h200": Card("H200", 4.8e12, 989e12, 495e12, 67e12),
}


@dataclass(frozen=True)
class Work:
    """What has to be done: bytes that must move, FLOPs, of which kind, by how many of our kernels.

    dependent: how many of these may begin while the one before ends. rereads: bytes that ours moves beyond those.
    share: of the card's limits that ours is expected to reach. serial: seconds of ours that neither limit explains (a chain
    of dependent steps).
    """

    op: str
    case: str
    bytes: int
    flops: int
    kind: str = "bf16"
    launches: int = 1
    dependent: int = 0
    rereads: int = 0
    share: float = 0.8
    serial: float = 0.0

    def perfect(self, card: Card) -> float:
        """Seconds of a perfect kernel."""
        return max(self.bytes / card.bandwidth, self.flops / getattr(card, self.kind)) + card.launch

    def ours(self, card: Card, *, recorded: bool = True) -> float:
        """Seconds expected of ours, replayed from a graph or launched by the host."""
        limit = max((self.bytes + self.rereads) / card.bandwidth, self.flops / getattr(card, self.kind))
        begun = (self.launches - self.dependent) * card.launch + self.dependent * card.dependent
        return limit / self.share + self.serial + (begun if recorded else self.launches * card.host_launch)


@dataclass(frozen=True)
class Shape:
    """A decoder with its memory; GPT-2 small and LangVAE's latent by default."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    head_dim: int = 64
    inner: int = 3072
    vocab: int = 50257
    latent: int = 128
    slots: int = 32

    @property
    def body(self) -> int:
        """Weights of the layers."""
        return self.layers * (4 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.inner)

    @property
    def memory(self) -> int:
        """Numbers of one sentence's memory."""
        return self.layers * 2 * self.heads * self.slots * self.head_dim

    @property
    def projector(self) -> int:
        """Weights of latent_kv."""
        return self.memory * self.latent


def ops(shape: Shape, batch: int, tokens: int, width: int = 2) -> Iterator[Work]:
    """The ops of a training step over ``batch`` sentences of ``tokens`` tokens, and of a decode step over ``batch`` rows.

    width: bytes of a number of activations and frozen weights. The projector's weight and its moments are fp32.
    """
    s, rows = shape, batch * tokens
    kind = "bf16" if width == 2 else "tf32"
    project = 2 * batch * s.projector
    case = f"batch {batch}"
    posterior = batch * s.latent
    yield Work("posterior_sample", case, 4 * 3 * posterior, 40 * posterior, "fp32", share=0.5)
    # three TF32 products for one of fp32
    yield Work("latent_kv forward", case, 4 * s.projector + width * batch * s.memory, 3 * project, "tf32")
    yield Work("latent_kv dz", case, 4 * s.projector + width * batch * s.memory, 3 * project, "tf32", launches=2)
    gram = 2 * batch**2 * s.memory  # up to a batch of the latent's width; then tiles of the gradient
    yield Work("latent_kv norm", case, width * batch * s.memory, 3 * min(gram, project), "tf32", launches=3)
    update = width * batch * s.memory + 6 * 4 * s.projector
    yield Work("latent_kv AdamW", case, update, 3 * project, "tf32", launches=2)
    heads = s.heads * s.head_dim
    seen = s.slots + tokens / 2  # keys that a query sees, on average
    attention = int(4 * rows * heads * seen)
    passed = width * (4 * rows * heads + 2 * batch * s.slots * heads)
    yield Work("latent_attention forward", f"{case}, a layer", passed, attention, kind, share=0.4)
    yield Work("latent_attention backward", f"{case}, a layer", 2 * passed, int(2.5 * attention), kind, share=0.3)
    states, inner = width * rows * s.hidden, width * rows * s.inner
    # rows of half a kilobyte or so: a wave of programs of a microsecond each
    yield Work("frozen_layer sum and norm", f"{case}, a layer", 4 * states, 10 * rows * s.hidden, "fp32", share=0.5)
    yield Work("frozen_layer activation", f"{case}, a layer", 2 * inner, 20 * rows * s.inner, "fp32", share=0.5)
    head = s.hidden * s.vocab
    chunks = max(1, -(-rows // max(128, (128 << 20) // (4 * s.vocab) // 128 * 128)))
    logits = (
        rows * s.vocab * (4 + 4 + 4 + 2 * width)
    )  # fp32 logits written and read twice, the gradient written and read
    yield Work(
        "lm_head_loss forward and backward", case, width * (head + 2 * rows * s.hidden), 4 * rows * head, kind,
        launches=3 * chunks, rereads=logits + (2 * chunks - 1) * width * head,
    )  # fmt: skip
    cache = width * batch * 2 * heads * (s.slots + tokens)
    yield Work(
        "latent_attention_decode",
        f"{case}, a layer",
        cache,
        int(4 * batch * heads * (s.slots + tokens)),
        kind,
        share=0.5,
    )
    few = min(batch, FEW)  # beyond them torch's products are taken
    layer = s.body // s.layers
    yield Work(
        "row_product", f"{few} rows, a layer", width * layer, 2 * few * layer, kind, launches=4, dependent=4, share=0.6
    )
    # beyond 128 rows the product writes its logits, and this is not called
    served = min(batch, 128)
    greedy = width * (head + served * s.hidden)
    blocks = -(-s.vocab // 64)
    yield Work(
        "greedy_product", f"{served} rows", greedy, 2 * served * head, kind, launches=2, rereads=16 * served * blocks
    )
    draws = 4 * batch * s.vocab
    waves = -(-batch // 132)
    # three readings by one program: blocks of 2,048, each a wait for memory of some 0.7 us, of which two readings (the largest,
    # the histogram) have three under way; the rest happens in registers
    wait = waves * (-(-s.vocab // 2048) * (2 / 3 + 1) * 0.7e-6 + 8e-6)
    yield Work("sample_token top-k, top-p", case, draws, 60 * batch * s.vocab, "fp32", rereads=2 * draws, serial=wait)
    pairs = batch * batch * s.latent
    yield Work(
        "aggregate_logpdf", case, 4 * 4 * posterior, 40 * pairs, "fp32", launches=2, share=0.3, serial=batch * 0.1e-6
    )
    flow = 12 * 3 * 2 * s.latent * s.latent * 4  # 12 couplings of three layers, weights of fp32
    yield Work("coupling_flow", case, flow, batch * flow // 2, "fp32", serial=36 * 3e-6, rereads=flow * -(-batch // 32))


def loops(shape: Shape, batch: int, tokens: int, width: int = 2) -> Iterator[Work]:
    """A training step, and a decode step. Their launches are GPT-2's layers as they are written out, counted by tests
    (tests/models/decoder/test_training_kernels.py), and some around them."""
    s, rows = shape, batch * tokens
    kind = "bf16" if width == 2 else "tf32"
    body, head = 2 * rows * s.body, 2 * rows * s.hidden * s.vocab
    parts = {work.op: work for work in ops(s, batch, tokens, width)}
    kv = [parts[f"latent_kv {name}"] for name in ("forward", "dz", "norm", "AdamW")]
    moved = width * (2 * s.body + s.hidden * s.vocab) + sum(work.bytes for work in kv)
    activations = 2 * s.layers * rows * width * (8 * s.hidden + 2 * s.inner)
    yield Work(
        "training step", f"batch {batch}", moved + activations, 2 * body + 2 * head, kind,
        launches=s.layers * 17 + 40, rereads=activations + parts["lm_head_loss forward and backward"].rereads, share=0.6,
    )  # fmt: skip
    cache = s.layers * parts["latent_attention_decode"].bytes
    step = width * (s.body + s.hidden * s.vocab) + cache
    flops = 2 * batch * (s.body + s.hidden * s.vocab)
    few = batch <= FEW  # then four products and the attention between them are a layer, and each begins early
    yield Work(
        "decode step", f"batch {batch}", step, flops, kind, launches=s.layers * (5 if few else 8) + 12,
        dependent=s.layers * 5 if few else s.layers, share=0.6,
    )  # fmt: skip


def rows_of(card: Card, shape: Shape | None = None) -> list[dict[str, Any]]:
    """One row per op and loop: work, and microseconds of a perfect kernel, of ours recorded, and of ours launched."""
    shape, out = shape or Shape(), []
    for batch in (32, 256):
        out += ops(shape, batch, 16)
    for batch in (1, 32, 256):
        out += loops(shape, batch, 16)
    return [
        {
            **asdict(work),
            "perfect_us": round(work.perfect(card) * 1e6, 1),
            "expected_us": round(work.ours(card) * 1e6, 1),
            "expected_launched_us": round(work.ours(card, recorded=False) * 1e6, 1),
        }
        for work in out
    ]


def table() -> str:
    """Markdown: expected, not measured; from the record."""
    record = json.loads(RECORD.read_text())
    lines = [
        "| op or loop | case | MB | GFLOP | kernels | perfect | expected | launched by the host |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['op']} | {row['case']} | {row['bytes'] / 1e6:,.1f} | {row['flops'] / 1e9:,.1f} | {row['launches']} | "
        f"{row['perfect_us']:,.0f} us | {row['expected_us']:,.0f} us | {row['expected_launched_us']:,.0f} us |"
        for row in record["rows"]["h200"]
    ]
    return "\n".join(lines)


TABLES = {"roofline": table}


def steps_of(record: dict[str, Any]) -> dict[str, float]:
    """ "op, case" -> microseconds of the bf16 rows of a record of benchmarks.training.end_to_end."""
    out = {}
    for row in record["rows"]:
        us = 1e3 * row["milliseconds"]["ours"]
        decoded = re.match(r"greedy decoding of (\d+) tokens", row["what"])
        if row["precision"] == "bf16" and row["what"] == "training step":
            out[f"training step, batch {row['batch']}"] = us
        elif row["precision"] == "bf16" and decoded:
            out[f"decode step, batch {row['batch']}"] = us / int(decoded[1])
    return out


def compare(measured: dict[str, float], rows: list[dict[str, Any]]) -> list[str]:
    """Lines "op, case: measured against expected" of the measurements, "op, case" -> microseconds, that have a row."""
    known = {f"{row['op']}, {row['case']}": row for row in rows}
    return [
        f"{name}: {us:,.1f} us measured, {known[name]['expected_us']:,.1f} expected, {known[name]['perfect_us']:,.1f} perfect "
        f"({us / known[name]['expected_us']:.1f} x expected)"
        for name, us in measured.items()
        if name in known
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CARDS, default="h200")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument(
        "--write", action="store_true", help=f"write {RECORD.relative_to(ROOT)}, which docs/gpu.md's table is made from"
    )
    parser.add_argument(
        "--measured", type=Path, help='JSON of {"op, case": microseconds} to print beside the expected ones'
    )
    options = parser.parse_args(arguments)
    rows = rows_of(CARDS[options.device])
    if options.write:
        record = {
            "expected": "by arithmetic, not measured",
            "cards": {name: asdict(card) for name, card in CARDS.items()},
        }
        record["rows"] = {name: rows_of(card) for name, card in CARDS.items()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if options.measured:
        measured = json.loads(options.measured.read_text())
        lines = compare(steps_of(measured) if "rows" in measured else measured, rows)
        print("\n".join(lines) or "nothing measured that is expected")
    elif options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            times = f"perfect {row['perfect_us']:>9,.1f} us   expected {row['expected_us']:>9,.1f} us"
            print(f"{row['op']:<34} {row['case']:<20} {times}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
