"""The picture of README.md, docs/images/times_faster.svg: times faster than LangVAE, from the records and nothing else.

    python -m benchmarks.report      # draws it, with the tables

Written out by hand rather than by a plotting library, so that the same records give the same bytes everywhere.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from benchmarks.common.records import ROOT, load

FILE = ROOT / "docs" / "images" / "times_faster.svg"
SHAPE = "gpt2-small"
RECORDS = ("training/steps/langvae.json", "generation/langvae.json")
# Sides as they are recorded: (title, colour). Light blue is what computes the same as LangVAE.
TRAINING = {
    "free-running fp32": ("same loss on its own output, fp32", "#8db4df"),
    "teacher-forced fp32": ("teacher forcing, fp32", "#2f6db3"),
    "teacher-forced bf16": ("teacher forcing, bf16", "#d9822b"),
}
DECODING = {"engine fp32": ("the same tokens, fp32", "#8db4df"), "engine bf16": ("bf16", "#d9822b")}
WIDTH, PANEL, LEFT, BAR, GAP = 860, 430, 84, 18, 14
STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1d2433; }
.title { font-weight: 600; font-size: 15px; } .soft { fill: #5b657a; font-size: 12px; } .line { stroke: #8891a5; }
@media (prefers-color-scheme: dark) { text { fill: #e6eaf2; } .soft { fill: #a3adc0; } }
"""


@dataclass(frozen=True)
class Panel:
    """One half of the picture: bars by batch size, in the colours of their sides."""

    title: str
    sides: dict[str, tuple[str, str]]
    rows: list[dict[str, Any]]

    def height(self) -> int:
        """Pixels that the bars and the legend take."""
        return len(self.rows) * (len(self.sides) * BAR + GAP) + 22 * len(self.sides) + 64


def panels() -> list[Panel] | None:
    """Training and decoding, or None where a record is missing."""
    training, decoding = (load(name) for name in RECORDS)
    if training is None or decoding is None:
        return None
    steps = [row for row in training["cases"] if row["shape"] == SHAPE]
    return [Panel("A training step", TRAINING, steps), Panel("Decoding 32 tokens", DECODING, decoding["rows"])]


def draw(halves: list[Panel], title: str, note: str) -> str:
    """The SVG: bars whose length is the factor, on one scale, and a line at 1 that is LangVAE itself."""
    longest = max(row["speedup"][side] for half in halves for row in half.rows for side in half.sides)
    scale = (PANEL - LEFT - 64) / longest
    height = max(half.height() for half in halves) + 50
    alternative = "; ".join(f"{half.title}: {_sentence(half)}" for half in halves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{html.escape(alternative, quote=True)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="10" y="22">{html.escape(title)}</text>',
    ]
    for number, half in enumerate(halves):
        parts += _half(half, 10 + number * PANEL, 50, scale)
    parts += [f'<text class="soft" x="10" y="{height - 12}">{html.escape(note)}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _sentence(half: Panel) -> str:
    return ", ".join(
        f"batch {row['batch']} {title} {row['speedup'][side]:.1f}"
        for row in half.rows for side, (title, _) in half.sides.items()
    )  # fmt: skip


def _half(half: Panel, x: int, y: int, scale: float) -> list[str]:
    parts = [f'<text class="title" x="{x}" y="{y + 6}">{half.title}</text>']
    top = y = y + 24
    for row in half.rows:
        middle = y + len(half.sides) * BAR / 2 + 4
        parts.append(f'<text x="{x}" y="{middle:.0f}">batch {row["batch"]}</text>')
        for side, (_, colour) in half.sides.items():
            factor = row["speedup"][side]
            parts += [
                f'<rect x="{x + LEFT}" y="{y}" width="{factor * scale:.1f}" height="{BAR - 3}" rx="2" fill="{colour}"/>',
                f'<text x="{x + LEFT + factor * scale + 6:.1f}" y="{y + BAR - 6}">{factor:.1f}x</text>',
            ]
            y += BAR
        y += GAP
    one = x + LEFT + scale
    parts += [
        f'<line class="line" x1="{one:.1f}" x2="{one:.1f}" y1="{top - 6}" y2="{y - 6}" stroke-dasharray="3 3"/>',
        f'<text class="soft" x="{one + 5:.1f}" y="{y + 6}">1x: LangVAE</text>',
    ]
    y += 26
    for title, colour in half.sides.values():
        parts += [
            f'<rect x="{x + LEFT}" y="{y - 10}" width="12" height="12" rx="2" fill="{colour}"/>',
            f'<text class="soft" x="{x + LEFT + 18}" y="{y}">{html.escape(title)}</text>',
        ]
        y += 20
    return parts


def picture() -> str | None:
    """The SVG of what is recorded; None where nothing is."""
    halves = panels()
    if halves is None:
        return None
    machines = [load(name)["machine"] for name in RECORDS]  # there, or there were no panels
    title = f"Times faster than LangVAE 0.6.13 ({SHAPE}, {machines[0]['threads']} CPU threads)"
    places = " and ".join(dict.fromkeys(f"{machine['cpu']}, {machine['date'][:10]}" for machine in machines))
    return draw(halves, title, f"Both sides timed in turn: {places}. All figures: docs/results.md")
