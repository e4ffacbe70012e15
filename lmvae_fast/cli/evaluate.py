"""Command ``lmvae-fast eval``: figures of a model on sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.common import Backend, Json, Model, console, load_model, print_json, read_sentences
from lmvae_fast.errors import ConfigError

DEFAULT_METRICS = "elbo,active_units,mutual_information,bleu,exact_match,token_accuracy"


def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Sentences: a file, or `corpus`. With --definitions: a file of definitions; default: the flow's own."
        ),
    ] = None,
    of_definitions: Annotated[
        bool, typer.Option("--definitions", help="Measure how a folder of `fit-flow` defines words.")
    ] = False,
    column: Annotated[str | None, typer.Option(help="Column or field with the sentence.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many sentences.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated, or `all`.")] = None,
    samples: Annotated[int, typer.Option(help="Importance samples of the perplexity.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Sentences per pass.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    part: Annotated[str, typer.Option(help="With --definitions: train, valid, test or all.")] = "test",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="With --definitions: leave words without a vector out.")
    ] = False,
    mover_model: Annotated[
        str | None, typer.Option(help="With --definitions: encoder of MoverScore (name or folder).")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="With --definitions: write an HTML page.")] = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on sentences: ELBO, KL, active units, mutual information, BLEU; `--metrics perplexity` for IW-PPL.

    With `--definitions`, of a folder that `fit-flow` wrote: sense-BLEU, lemma-BLEU, cosine, NLL, reverse dictionary.

    Example: `lmvae-fast eval runs/first held_out.txt --json`, `lmvae-fast eval runs/flow --definitions --skip-missing`
    """
    from lmvae_fast.kernels.backend import backend as use_backend

    if of_definitions:
        from lmvae_fast.cli.definitions import evaluate as evaluate_flow

        with use_backend(backend):
            return evaluate_flow(
                model, data, part=part, limit=limit, metrics=metrics or "all", mover_model=mover_model,
                skip_missing=skip_missing, seed=seed, batch_size=batch_size, report=report, as_json=as_json,
            )  # fmt: skip
    if data is None:
        raise ConfigError(
            "no sentences", remedy="name a file, or `corpus`; with --definitions a flow's folder is enough"
        )
    from lmvae_fast.evaluation.evaluate import METRICS
    from lmvae_fast.evaluation.evaluate import evaluate as run

    sentences = read_sentences(data, column, limit)
    chosen = METRICS if metrics == "all" else tuple(name.strip() for name in (metrics or DEFAULT_METRICS).split(","))
    with use_backend(backend):
        result = run(
            load_model(model), sentences, batch_size=batch_size, num_importance_samples=samples, metrics=chosen, seed=seed,
            progress=not as_json,
        )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
        return
    table = Table("figure", "value")
    for name, value in result.to_dict().items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    for example in result.examples[:5]:
        console.print(example, markup=False)
