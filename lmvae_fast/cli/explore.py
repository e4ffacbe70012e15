"""``lmvae-fast interpolate``, ``traverse`` and ``arithmetic``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.app import app
from lmvae_fast.cli.common import (
    Backend,
    Json,
    Model,
    Sample,
    Seed,
    Temperature,
    TopK,
    TopP,
    console,
    generation_config,
    load_model,
    print_json,
)
from lmvae_fast.errors import ConfigError


@app.command("interpolate")
def interpolate(
    model: Model,
    a: Annotated[str, typer.Argument(help="First sentence.")],
    b: Annotated[str, typer.Argument(help="Last sentence.")],
    steps: Annotated[int, typer.Option(help="Points, both ends included.")] = 11,
    spherical: Annotated[bool, typer.Option("--spherical", help="Along the great circle.")] = False,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode the way from one sentence to another.

    Example: `lmvae-fast interpolate runs/first "a cat is an animal" "the sun is a star"`
    """
    from lmvae_fast.generation.latent_ops import interpolate as run
    from lmvae_fast.kernels.backend import backend as use_backend

    options = generation_config(sample, temperature, top_k, top_p, seed).to_dict()
    with use_backend(backend):
        out = run(load_model(model), a, b, steps, spherical=spherical, **options)
    if as_json:
        print_json([{"weight": weight, "text": text} for weight, text in zip(out.weights, out.texts, strict=True)])
        return
    table = Table("weight", "text")
    for weight, text in zip(out.weights, out.texts, strict=True):
        table.add_row(f"{weight:.2f}", text)
    console.print(table)


@app.command("traverse")
def traverse(
    model: Model,
    text: Annotated[str, typer.Argument(help="Where to start.")],
    dims: Annotated[str, typer.Option(help="Dimensions, as 0,3,5-7; default: the first eight.")] = "",
    steps: Annotated[int, typer.Option(help="Values per dimension.")] = 7,
    span: Annotated[float, typer.Option(help="How far to go, in standard deviations of the prior.")] = 3.0,
    sample: Sample = False,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode a sentence while one dimension of its latent moves.

    Example: `lmvae-fast traverse runs/first "a cat is an animal" --dims 0-3`
    """
    from lmvae_fast.generation.latent_ops import traverse as run
    from lmvae_fast.kernels.backend import backend as use_backend

    loaded = load_model(model)
    chosen = parse_dims(dims) if dims else list(range(min(8, loaded.config.latent_dim)))
    options = generation_config(sample, temperature, top_k, top_p, seed).to_dict()
    with use_backend(backend):
        out = run(loaded, text, chosen, steps, span=span, **options)
    if as_json:
        print_json({"dims": out.dims, "values": out.values, "texts": out.texts})
        return
    table = Table("dim", "value", "text")
    for dim, texts in zip(out.dims, out.texts, strict=True):
        for value, decoded in zip(out.values, texts, strict=True):
            table.add_row(str(dim), f"{value:+.1f}", decoded)
        table.add_section()
    console.print(table)


@app.command("arithmetic")
def arithmetic(
    model: Model,
    expression: Annotated[str, typer.Argument(help='Sentences joined by " + " and " - ".')],
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode a sum of sentences.

    Example: `lmvae-fast arithmetic runs/first "a cat is an animal - cats meow + dogs bark"`
    """
    from lmvae_fast.generation.latent_ops import arithmetic as run
    from lmvae_fast.kernels.backend import backend as use_backend

    with use_backend(backend):
        out = run(load_model(model), expression)
    if as_json:
        print_json({"terms": out.terms, "text": out.text, "latent": out.latent.tolist()})
    else:
        console.print(out.text, markup=False)


def parse_dims(text: str) -> list[int]:
    """``"0,3,5-7"`` -> ``[0, 3, 5, 6, 7]``; raises ConfigError for anything else."""
    dims: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ConfigError("--dims wants numbers and ranges", value=text, remedy="for example 0,3,5-7")
        dims.extend(range(int(low), int(high or low) + 1))
    return dims
