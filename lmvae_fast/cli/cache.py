"""Commands ``lmvae-fast cache``: what is kept to save time, and its removal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.common import Json, console, print_json

if TYPE_CHECKING:
    from lmvae_fast.caches import Entry

app = typer.Typer(no_args_is_help=True, help="What is kept to save time (converted models, tokens, features, logs).")

Run = Annotated[Path | None, typer.Option(help="Of this run's folder; default: what all work of this user shares.")]


@app.command("list")
def list_entries(run: Run = None, as_json: Json = False) -> None:
    """What is kept, largest first.

    Example: `lmvae-fast cache list --run runs/first`
    """
    from lmvae_fast.caches import entries

    _show(entries(run), as_json, "kept")


@app.command("prune")
def prune(
    run: Run = None,
    older_than: Annotated[float, typer.Option(min=0.0, help="Days; 0 removes everything.")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what is kept and old. It is made again when it is wanted.

    Example: `lmvae-fast cache prune --older-than 7`
    """
    from lmvae_fast import caches

    old = [entry for entry in caches.entries(run) if entry.days >= older_than] if dry_run else None
    _show(
        old if old is not None else caches.prune(run, days=older_than), as_json, "to remove" if dry_run else "removed"
    )


def _show(found: list[Entry], as_json: bool, what: str) -> None:
    size = sum(entry.size for entry in found)
    if as_json:
        rows = [{"kind": e.kind, "path": str(e.path), "bytes": e.size, "days": round(e.days, 2)} for e in found]
        print_json({"entries": rows, "bytes": size})
        return
    table = Table("kind", "MB", "days", "path")
    for entry in found:
        table.add_row(entry.kind, f"{entry.size / 1e6:,.1f}", f"{entry.days:.1f}", str(entry.path))
    if found:
        console.print(table)
    console.print(f"{what}: {len(found)} entries, {size / 1e6:,.1f} MB")
