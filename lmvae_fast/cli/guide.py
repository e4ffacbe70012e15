"""``lmvae-fast guide``: answers moved along the direction of a label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lmvae_fast.cli.common import Backend, Json, Model, SamplingOptions, console, load_model, print_json, takes_sampling
from lmvae_fast.cli.prompt_data import Layout, TurnEnd, read_pairs
from lmvae_fast.errors import ConfigError

if TYPE_CHECKING:
    from lmvae_fast.models.lmvae import LMVAE


@takes_sampling
def guide(
    model: Model,
    data: Annotated[Path, typer.Option(help="Prompts with labelled responses, which the classifier learns from.")],
    responses: Annotated[
        Path | None,
        typer.Option(
            help="Several responses to each prompt, whose latents the directions are read off, as `generate --num-samples` writes them; default: the data's."  # noqa: E501
        ),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Labels to move to (repeatable); default: all.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far, along a direction of length one; default: 16.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Responses that are moved.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Read at most this many texts.")] = None,
    layout: Layout = None,
    turn_end: TurnEnd = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    save: Annotated[
        Path | None, typer.Option(help="Write the directions: a .safetensors file of one vector per label.")
    ] = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Move responses along the direction of latent space in which a label becomes more probable.

    A logistic regression on the posterior means says how probable labels are; a label's direction is the correlation of its
    probability with each latent dimension, within prompts, less that of all labels.

    Example: `lmvae-fast guide runs/cvae/model --data yelp.txt --layout yelp --responses sampled.jsonl --label 1`
    """
    from lmvae_fast.data import read_prompts
    from lmvae_fast.exploration.guided import STRENGTH, fit_label_classifier, guided, label_directions
    from lmvae_fast.kernels.backend import backend as use_backend

    if save is not None and save.suffix != ".safetensors":
        raise ConfigError("directions are written as safetensors", value=save, remedy="--save directions.safetensors")
    far = STRENGTH if strength is None else strength
    options = sampling.config().to_dict()
    with use_backend(backend):
        loaded = load_model(model)
        _check_prompted(loaded)
        reading: dict[str, Any] = {"layout": layout, "turn_end": turn_end, "limit": limit}
        labelled = read_pairs(data, decoder=loaded.config.decoder, model=loaded.config.to_dict(), **reading)
        sampled = labelled if responses is None else read_prompts(responses)
        classifier = fit_label_classifier(loaded, labelled)
        wanted = _labels(label, classifier.labels)
        directions = label_directions(loaded, sampled, classifier)
        moved = list(sampled)[:count]
        texts = {name: guided(loaded, moved, directions[name], strength=far, **options) for name in wanted}
    if save is not None:
        from lmvae_fast.files import replacing, write_tensors

        with replacing(save) as temporary:
            write_tensors(temporary, directions)
    rows: list[dict[str, Any]] = [
        {"prompt": pair.prompt, "response": pair.response, "guided": {name: texts[name][row] for name in wanted}}
        for row, pair in enumerate(moved)
    ]
    if as_json:
        print_json({"labels": list(classifier.labels), "strength": far, "responses": rows,
                    "directions": {name: directions[name].tolist() for name in classifier.labels}})  # fmt: skip
        return
    table = Table("prompt", "response", *(f"towards {name}" for name in wanted))
    for row in rows:
        table.add_row(str(row["prompt"]), row["response"], *row["guided"].values())
    console.print(table)
    if save is not None:
        console.print(f"directions: {save}", markup=False)


def _check_prompted(model: LMVAE) -> None:
    if not model.config.prompted:
        raise ConfigError(
            "labels guide the responses of a model of prompts", value=f"system {model.config.system}",
            limit="a model that reads prompt and response", remedy="train one with --system cvae",
        )  # fmt: skip


def _labels(given: list[str] | None, known: tuple[str, ...]) -> list[str]:
    for name in given or ():
        if name not in known:
            raise ConfigError("the data has no such label", value=name, limit=", ".join(known), remedy="change --label")
    return list(dict.fromkeys(given or known))
