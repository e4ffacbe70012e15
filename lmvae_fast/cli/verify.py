"""Command ``lmvae-fast verify``: whether a folder or file is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.common import BAD_INPUT, Json, console, print_json


def verify(
    path: Annotated[
        Path,
        typer.Argument(help="A model, a run, a checkpoint, a flow, a file of latents, or one that generate wrote."),
    ],
    latent_dim: Annotated[int | None, typer.Option(min=1, help="Width that latents must have.")] = None,
    as_json: Json = False,
) -> None:
    """Look at hashes, shapes, finite numbers and completeness; nothing is changed.

    Exit code 0 when everything is as it should be, 3 otherwise.

    Example: `lmvae-fast verify runs/first`
    """
    from lmvae_fast.verification import verify as look

    found = look(path, latent_dim=latent_dim)
    if as_json:
        print_json(found.to_dict())
    else:
        table = Table("", "check", "found")
        for check in found.checks:
            table.add_row(
                "ok" if check.good else "BAD", check.name, check.found, style=None if check.good else "bold red"
            )
        console.print(f"{found.path}: {found.kind}, {'as it should be' if found.good else 'NOT as it should be'}")
        console.print(table)
    if not found.good:
        raise typer.Exit(BAD_INPUT)
