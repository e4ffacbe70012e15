"""A self-contained HTML report: text, tables and figures in one file that opens anywhere."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmvae_fast.files import GENERATOR, fsync_file, replacing
from lmvae_fast.optional import require

_STYLE = """
:root { --ink: #1d2433; --soft: #5b657a; --line: #dfe4ec; --accent: #2f6db3; --good: #1f7a4d; --back: #fbfcfe; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--back); }
main { max-width: 1040px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p.lead, .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.4rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; background: #fff; font-size: .93rem; margin: .6rem 0 1rem; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; }
figure { margin: .8rem 0; } figure svg { width: 100%; height: auto; }
code { background: #eef2f8; padding: .1rem .3rem; border-radius: 4px; font-size: .9em; }
@media (max-width: 620px) { main { padding: 1.4rem .8rem; } th, td { padding: .3rem .4rem; } }
"""


class Report:
    """Collects parts in order and writes them as one HTML file."""

    def __init__(self, title: str, lead: str):
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]

    def heading(self, text: str, note: str = "") -> None:
        """A section, with a sentence on what it shows."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")
        self.note(note)

    def part(self, text: str, note: str = "") -> None:
        """A part of a section: a table's title, and a sentence on it."""
        self.parts.append(f"<h3>{html.escape(text)}</h3>")
        self.note(note)

    def note(self, text: str) -> None:
        """A sentence in small print; nothing for an empty one."""
        if text:
            self.parts.append(f"<p class=soft>{html.escape(text)}</p>")

    def cards(self, figures: Iterable[tuple[str, str]]) -> None:
        """Large figures: (value, what it is)."""
        cells = (
            f"<div class=card><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
            for value, name in figures
        )
        self.parts.append(f"<div class=cards>{''.join(cells)}</div>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; numbers are aligned to the right."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self.parts.append(f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>")

    def figures(self, rows: Iterable[tuple[str, str, Any, Any, str]]) -> None:
        """Figures with their meaning: (name, what it says, value, spread, range); the sentence stands below the name, so that
        a narrow screen need not scroll."""
        head = "<th>figure</th><th>value</th><th>+-</th><th>range</th>"
        body = "".join(
            f"<tr><td>{html.escape(name)}<small>{html.escape(text)}</small></td>"
            f"{_cell(value)}{_cell(spread)}<td>{html.escape(limits)}</td></tr>"
            for name, text, value, spread, limits in rows
        )
        self.parts.append(f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>")

    def figure(self, figure: Any, description: str) -> None:
        """A matplotlib figure, as vector graphics inside the page; it is closed."""
        import matplotlib.pyplot as plt

        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        plt.close(figure)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        self.parts.append(f'<figure role=img aria-label="{html.escape(description, quote=True)}">{svg}</figure>')

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; a reader never sees half of it."""
        path = Path(path)
        page = (
            f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=generator content={GENERATOR}>"
            f"<title>{html.escape(self.title)}</title>"
            f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
            f"<body><main>{''.join(self.parts)}</main></body></html>"
        )
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
            fsync_file(temporary)
        return path


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f"<td class=number>{text}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def plane(points: Any) -> Any:
    """Points ``[N, dimensions]`` on the two directions along which they vary most: a NumPy array ``[N, 2]``."""
    import numpy as np

    points = np.asarray(points, dtype=np.float64)
    centred = points - points.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def style() -> None:
    """Matplotlib settings of our figures (no display is needed). Raises MissingPackageError without matplotlib."""
    matplotlib = require("matplotlib", purpose="drawing figures", extra="demo")
    from cycler import cycler

    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "figure.figsize": (9, 3.4), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "axes.edgecolor": "#8891a5", "font.size": 10, "svg.fonttype": "none",
        "axes.prop_cycle": cycler(color=["#2f6db3", "#d9822b", "#1f7a4d", "#a33c5b", "#6b5bb5", "#5b657a"]),
    })  # fmt: skip
