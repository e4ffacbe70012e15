"""``lmvae-fast eval``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.common import Backend, Json, Model, console, load_model, print_json, read_sentences


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Sentences: a file, or `corpus`.")],
    column: Annotated[str | None, typer.Option(help="Column or field with the sentence.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many sentences.")] = None,
    metrics: Annotated[str, typer.Option(help="Comma-separated, or `all`.")] = "elbo,active_units,mutual_information,bleu,exact_match,token_accuracy",  # noqa: E501
    samples: Annotated[int, typer.Option(help="Importance samples of the perplexity.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Sentences per pass.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on sentences: ELBO, KL, active units, mutual information, BLEU; `--metrics perplexity` for IW-PPL.

    Example: `lmvae-fast eval runs/first held_out.txt --json`
    """
    from lmvae_fast.evaluation.evaluate import METRICS
    from lmvae_fast.evaluation.evaluate import evaluate as run
    from lmvae_fast.kernels.backend import backend as use_backend

    sentences = read_sentences(data, column, limit)
    chosen = METRICS if metrics == "all" else tuple(name.strip() for name in metrics.split(","))
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
