"""Command ``lmvae-fast eval``: figures of a model on sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lmvae_fast.cli.common import Backend, Json, Model, console, load_model, print_json, read_sentences
from lmvae_fast.cli.prompt_data import Layout, TurnEnd, read_pairs
from lmvae_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lmvae_fast.data import PromptDataset

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
    seed: Annotated[int, typer.Option(max=2**63 - 1, help="Of the noise.")] = 0,
    part: Annotated[str, typer.Option(help="With --definitions: train, valid, test or all.")] = "test",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="With --definitions: leave words without a vector out.")
    ] = False,
    mover_model: Annotated[
        str | None, typer.Option(help="With --definitions: encoder of MoverScore (name or folder).")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="With --definitions: write an HTML page.")] = None,
    layout: Layout = None,
    turn_end: TurnEnd = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Of a model of prompts: responses that `generate` wrote to the data's prompts, measured against its own."
        ),
    ] = None,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="The answers are, one by one, to the data's responses (`generate --texts`)."),
    ] = False,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on sentences: ELBO, KL, active units, mutual information, BLEU; `--metrics perplexity` for IW-PPL.

    Of a model of prompts with responses, also KL, mutual information, active and collapsed units among the responses to a
    prompt; with `--answers`, self-BLEU, distinct-4 and ROUGE-Lsum of generated ones.

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
    from lmvae_fast.evaluation.evaluate import METRICS, WITHIN_PROMPTS
    from lmvae_fast.evaluation.evaluate import evaluate as run

    loaded = load_model(model)
    prompted = loaded.config.prompted
    if answers is not None and not prompted:
        raise ConfigError("answers are those to prompts", value="a model of sentences", remedy="leave --answers out")
    if prompted:
        options: dict[str, Any] = {"layout": layout, "turn_end": turn_end, "limit": limit}
        sentences = read_pairs(data, decoder=loaded.config.decoder, model=loaded.config.to_dict(), **options)
    else:
        sentences = read_sentences(data, column, limit)
    known = (*METRICS, WITHIN_PROMPTS) if prompted else METRICS
    default = DEFAULT_METRICS + (f",{WITHIN_PROMPTS}" if prompted else "")
    chosen = known if metrics == "all" else tuple(name.strip() for name in (metrics or default).split(","))
    with use_backend(backend):
        result = run(
            loaded, sentences, batch_size=batch_size, num_importance_samples=samples, metrics=chosen, seed=seed,
            progress=not as_json,
        )  # fmt: skip
    figures = result.to_dict()
    if answers is not None:
        figures["answers"] = _quality(answers, sentences, paired)
    if as_json:
        print_json(figures)
        return
    table = Table("figure", "value")
    inner = {**figures.pop("within_prompts", {}), **figures.pop("answers", {})}
    for name, value in {**figures, **{f"{name} (within prompts)": value for name, value in inner.items()}}.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    for example in result.examples[:5]:
        console.print(example, markup=False)


def _quality(answers: Path, data: PromptDataset, paired: bool) -> dict[str, float]:
    """Text measures of generated responses against the data's, prompt by prompt; DataError where a prompt has none."""
    from lmvae_fast.data import read_prompts
    from lmvae_fast.probes.response_quality import response_quality

    given = {
        prompt: [row.response for row in rows] for prompt, rows in read_prompts(answers, on_empty="error").by_prompt()
    }
    missing = [prompt for prompt in data.prompts if prompt not in given]
    if missing:
        raise DataError(
            f"{answers} answers not all of the data's prompts", value=f"{len(missing)} without, the first {missing[0][:60]!r}",
            remedy="generate answers to this data's prompts",
        )  # fmt: skip
    own = [[row.response for row in rows] for _, rows in data.by_prompt()]
    found = response_quality([given[prompt] for prompt in data.prompts], own, paired=paired)
    return {name: float(score) for name, score in found.items()}
