"""Commands ``lmvae-fast interpolate``, ``traverse``, ``arithmetic``, ``neighbourhood`` and ``average``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lmvae_fast.cli.common import (
    Backend,
    Json,
    Model,
    SamplingOptions,
    column_name,
    console,
    load_model,
    print_json,
    takes_sampling,
)
from lmvae_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from lmvae_fast.data.dataset import Example
    from lmvae_fast.exploration.drawings import Drawing
    from lmvae_fast.models.lmvae import LMVAE
    from lmvae_fast.models.posterior import Posterior

#: Dimensions that a traversal may be asked for: more than any latent has.
MOST_DIMS = 1_000_000

Output = Annotated[Path | None, typer.Option(help="Draw it: a page (.html) or a picture (.png).")]


@takes_sampling
def interpolate(
    model: Model,
    a: Annotated[str, typer.Argument(help="First sentence.")],
    b: Annotated[str, typer.Argument(help="Last sentence.")],
    steps: Annotated[int, typer.Option(help="Points, both ends included.")] = 11,
    spherical: Annotated[bool, typer.Option("--spherical", help="Along the great circle.")] = False,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    output: Output = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode the way from one sentence to another.

    Sentences of a model that reads labels are written as `sentence & one label per word`, here and below.

    Example: `lmvae-fast interpolate runs/first "a cat is an animal" "the sun is a star" --output way.html`
    """
    from lmvae_fast.exploration import drawings
    from lmvae_fast.exploration.operations import interpolate as run
    from lmvae_fast.kernels.backend import backend as use_backend

    drawings.check_output(output)
    options = sampling.config().to_dict()
    with use_backend(backend):
        loaded = load_model(model)
        out = run(loaded, _sentence(loaded, a), _sentence(loaded, b), steps, spherical=spherical, **options)
    pairs = list(zip(out.weights, out.texts, strict=True))
    table = Table("weight", "text")
    for weight, text in pairs:
        table.add_row(f"{weight:.2f}", text)
    document = [{"weight": weight, "text": text} for weight, text in pairs]
    _show(document, table, lambda: drawings.interpolation(out), output, as_json)


@takes_sampling
def traverse(
    model: Model,
    text: Annotated[str, typer.Argument(help="Where to start.")],
    dims: Annotated[str, typer.Option(help="Dimensions, as 0,3,5-7; default: the first eight.")] = "",
    steps: Annotated[int, typer.Option(help="Values per dimension.")] = 7,
    span: Annotated[float, typer.Option(help="How far to go, in standard deviations of the prior.")] = 3.0,
    quantiles_of: Annotated[
        Path | None,
        typer.Option(
            help="Go over quantiles of the aggregate posterior of these instead: a file of sentences, of latents (.npy, .safetensors), or of `mu` and `logvar` (.safetensors)."  # noqa: E501
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="With --quantiles-of: column or field with the sentence.")] = None,
    tail: Annotated[float, typer.Option(help="With --quantiles-of: the probability left out at either end.")] = 0.05,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    output: Output = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode a sentence while one dimension of its latent moves.

    Example: `lmvae-fast traverse runs/first "a cat is an animal" --dims 0-3 --quantiles-of sentences.txt`
    """
    from lmvae_fast.exploration import drawings
    from lmvae_fast.exploration.operations import traverse as run
    from lmvae_fast.kernels.backend import backend as use_backend

    drawings.check_output(output)
    options = sampling.config().to_dict()
    with use_backend(backend):
        loaded = load_model(model)
        chosen = parse_dims(dims) if dims else list(range(min(8, loaded.config.latent_dim)))
        aggregate = None if quantiles_of is None else _aggregate(loaded, quantiles_of, column)
        out = run(loaded, _sentence(loaded, text), chosen, steps, span=span, aggregate=aggregate, tail=tail, **options)
    table = Table("dim", "value", "text")
    for dim, values, texts in zip(out.dims, out.values, out.texts, strict=True):
        for value, decoded in zip(values, texts, strict=True):
            table.add_row(str(dim), f"{value:+.2f}", decoded)
        table.add_section()
    document = {"dims": out.dims, "values": out.values, "texts": out.texts, "start": out.start}
    document |= {} if out.probabilities is None else {"probabilities": out.probabilities}
    _show(document, table, lambda: drawings.traversal(out), output, as_json)


def arithmetic(
    model: Model,
    expression: Annotated[str, typer.Argument(help='Sentences joined by " + " and " - ".')],
    output: Output = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode a sum of sentences.

    Example: `lmvae-fast arithmetic runs/first "a cat is an animal - cats meow + dogs bark"`
    """
    from lmvae_fast.exploration import drawings
    from lmvae_fast.exploration.operations import arithmetic as run
    from lmvae_fast.exploration.operations import parse_terms
    from lmvae_fast.kernels.backend import backend as use_backend

    drawings.check_output(output)
    with use_backend(backend):
        loaded = load_model(model)
        out = run(loaded, expression, sentences={text: _sentence(loaded, text) for _, text in parse_terms(expression)})
    document = {"terms": out.terms, "text": out.text, "latent": out.latent.tolist()}
    table = Table("term", "sentence")
    for factor, text in out.terms:
        table.add_row(f"{factor:+g}", text)
    table.add_section()
    table.add_row("=", out.text)
    _show(document, table, lambda: drawings.arithmetic(out), output, as_json)


@takes_sampling
def neighbourhood(
    model: Model,
    text: Annotated[str, typer.Argument(help="The sentence to draw around.")],
    samples: Annotated[int, typer.Option(help="How many latents to draw.")] = 16,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the draws, in those of the prior; default: the sentence's own posterior."
        ),
    ] = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    output: Output = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode latents drawn around a sentence, nearest first.

    Example: `lmvae-fast neighbourhood runs/first "a cat is an animal" --scale 0.5 --output around.html`
    """
    from lmvae_fast.exploration import drawings
    from lmvae_fast.exploration.operations import neighbourhood as run
    from lmvae_fast.kernels.backend import backend as use_backend

    drawings.check_output(output)
    options = sampling.config().to_dict()
    with use_backend(backend):
        loaded = load_model(model)
        out = run(loaded, _sentence(loaded, text), samples, scale=scale, noise_seed=sampling.seed, **options)
    rows = [
        {"distance": distance, "text": decoded, "latent": latent}
        for distance, decoded, latent in zip(out.distances, out.texts, out.latents.tolist(), strict=True)
    ]
    document = {"text": out.text, "center": out.center.tolist(), "neighbours": rows}
    _show(
        document, _distances(out.text, out.distances, out.texts), lambda: drawings.neighbourhood(out), output, as_json
    )


def average(
    model: Model,
    sentences: Annotated[list[str], typer.Argument(help="Sentences.")],
    output: Output = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Decode the mean of sentences' latents.

    Example: `lmvae-fast average runs/first "a cat is an animal" "a dog is an animal" "a cow is an animal"`
    """
    from lmvae_fast.exploration import drawings
    from lmvae_fast.exploration.operations import average as run
    from lmvae_fast.kernels.backend import backend as use_backend

    drawings.check_output(output)
    with use_backend(backend):
        loaded = load_model(model)
        out = run(loaded, [_sentence(loaded, text) for text in sentences])
    rows = [{"distance": distance, "text": text} for distance, text in zip(out.distances, out.texts, strict=True)]
    document = {"text": out.text, "latent": out.latent.tolist(), "sentences": rows}
    _show(document, _distances(out.text, out.distances, out.texts), lambda: drawings.average(out), output, as_json)


def _show(document: Any, table: Table, draw: Callable[[], Drawing], output: Path | None, as_json: bool) -> None:
    """The table, the JSON document, or the file that was drawn."""
    path = None if output is None else draw().save(output)
    if as_json:
        print_json(document)
    elif path is not None:
        console.print(f"drawn: {path}", markup=False)
    else:
        console.print(table)


def _distances(center: str, distances: list[float], texts: list[str]) -> Table:
    table = Table("distance", "text")
    table.add_row("0", center)
    table.add_section()
    for distance, text in zip(distances, texts, strict=True):
        table.add_row(f"{distance:.2f}", text)
    return table


def _sentence(model: LMVAE, text: str) -> str | Example:
    """The sentence, with its labels where the model reads them. Raises DataError where they are missing."""
    if not model.config.annotations:
        return text
    from lmvae_fast.data.dataset import Example

    words, separator, labels = text.rpartition("&")
    if not separator:
        raise DataError(
            "this model reads a label per word", value=repr(text), limit="sentence & label label ...",
            remedy=f"labels: {', '.join(model.config.annotations)}",
        )  # fmt: skip
    return Example(words.strip(), tuple(labels.split()))


def _aggregate(model: LMVAE, path: Path, column: str | None) -> Posterior | Tensor:
    """The posterior of a file's sentences, one that was saved, or latents. Raises DataError or LatentError for neither."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lmvae_fast.data import read
    from lmvae_fast.generation.latent_files import read_latents
    from lmvae_fast.models.posterior import Posterior

    if path.suffix not in (".npy", ".safetensors"):
        return model.encode(read(path, column=column_name(column)))
    if path.suffix == ".safetensors" and path.is_file():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path} is truncated or corrupt: {error}", remedy="write it again") from error
        if {"mu", "logvar"} <= tensors.keys():
            return Posterior(tensors["mu"], tensors["logvar"])
    import torch

    return torch.cat(list(read_latents(path, latent_dim=model.config.latent_dim)))


def parse_dims(text: str) -> list[int]:
    """Dimensions of a text: ``"0,3,5-7"`` -> ``[0, 3, 5, 6, 7]``; raises ConfigError for anything else."""
    dims: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or not low.isascii() or (dash and not (high.isdecimal() and high.isascii())):
            raise ConfigError("--dims wants numbers and ranges", value=text, remedy="for example 0,3,5-7")
        if max(len(low), len(high)) > 6:  # wider than any latent, and too many to be listed
            raise ConfigError("no such latent dimension", value=text, limit="below 1,000,000", remedy="change --dims")
        if len(dims) + int(high or low) - int(low) >= MOST_DIMS:
            raise ConfigError("too many latent dimensions", value=text, limit=f"{MOST_DIMS:,}", remedy="name each once")
        dims.extend(range(int(low), int(high or low) + 1))
    return dims
