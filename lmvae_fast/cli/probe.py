"""``lmvae-fast probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lmvae_fast.cli.common import Backend, Json, console, load_model, print_json, read_sentences


def probe(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a trained model (or a Hugging Face hub name).")
    ] = None,
    data: Annotated[str, typer.Option(help="Sentences: a file, or `corpus`.")] = "corpus",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two models (or the JSON files of their earlier probes) side by side, instead of MODEL."),
    ] = None,
    probes: Annotated[str | None, typer.Option(help="Comma-separated; `--probes help` lists them.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every probe that the inputs allow, with UMAP among the maps.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The page, an .html file; the JSON is written beside it.")] = Path(
        "probes.html"
    ),
    column: Annotated[str | None, typer.Option(help="Column or field with the sentence.")] = None,
    factor: Annotated[
        list[str] | None, typer.Option(help="Column or field of a factor, `name` or `name=column`.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many sentences.")] = None,
    sts: Annotated[
        Path | None, typer.Option(help="CSV of sentence pairs with scores (STS-B), for the similarity probe.")
    ] = None,
    linguistic: Annotated[
        Path | None, typer.Option(help="Folder of tasks in SentEval's format, for linguistic probing.")
    ] = None,
    vectors: Annotated[
        str, typer.Option(help="Word vectors of interpolations: encoder, decoder, glove, or a file.")
    ] = "encoder",
    samples: Annotated[
        bool, typer.Option("--samples/--means", help="Probe a draw of each posterior, not its mean.")
    ] = False,
    decoded: Annotated[int, typer.Option(help="Sentences decoded, and draws from the prior.")] = 500,
    resamples: Annotated[int, typer.Option(help="Of the paired bootstrap; 0 for none.")] = 200,
    cache: Annotated[Path | None, typer.Option(help="Folder of encodings; default: beside the page.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sentences per pass.")] = 64,
    seed: Annotated[int, typer.Option(max=2**63 - 1, help="Of everything random.")] = 0,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Probe a latent space: disentanglement, clusters, maps, interpolations, similarity, what classifiers read off it.

    Writes one HTML page and its JSON. Example: `lmvae-fast probe runs/first --data held_out.txt --all`
    """
    from lmvae_fast.errors import ConfigError
    from lmvae_fast.probes.run import PROBES
    from lmvae_fast.reports import probes as pages
    from lmvae_fast.reports.page import style

    if probes == "help":
        console.print("\n".join(PROBES))
        return
    if (model is None) == (compare is None):
        raise ConfigError(
            "one model, or two to compare", value=f"MODEL {model}, --compare {compare}",
            remedy="give a model, or --compare A B",
        )  # fmt: skip
    if output.suffix != ".html":
        raise ConfigError("the page is an .html file", value=output, remedy="--output probes.html")
    style()  # without matplotlib, it is refused before anything is encoded
    options: dict[str, Any] = {
        "probes": None if probes is None else [name.strip() for name in probes.split(",")],
        "sts": sts, "linguistic": linguistic, "vectors": vectors, "latents": "samples" if samples else "means",
        "decoded": decoded, "resamples": resamples, "batch_size": batch_size, "seed": seed, "progress": not as_json,
        "cache": cache or output.parent / ".probes_cache", "maps": ("pca", "tsne", "umap") if everything else ("pca", "tsne"),
    }  # fmt: skip
    reading = {"column": column, "limit": limit, "factor_columns": _factors(factor)}
    if compare is not None:
        found = [_report(source, data, reading, options, backend) for source in compare]
        _write_comparison(pages, found, output, as_json)
        return
    assert model is not None
    report = _report(model, data, reading, options, backend)
    pages.write(report, output)
    _write_json(output, report)
    if as_json:
        print_json(report)
        return
    _print(report)
    console.print(f"page: {output}\nJSON: {output.with_suffix('.json')}")


def _report(source: Path, data: str, reading: dict[str, Any], options: dict[str, Any], backend: str) -> dict[str, Any]:
    """The report of a model, probed now, or of an earlier JSON file."""
    from lmvae_fast.kernels.backend import backend as use_backend
    from lmvae_fast.probes.run import probe as run
    from lmvae_fast.probes.run import read_report

    if source.suffix == ".json":
        return read_report(source)
    with use_backend(backend):
        return run(load_model(source), read_sentences(data, **reading), name=str(source), **options).to_dict()


def _write_comparison(pages: Any, found: list[dict[str, Any]], output: Path, as_json: bool) -> None:
    from lmvae_fast.probes.compare import compare

    comparison = compare(*found)
    pages.write_comparison(comparison, output)
    _write_json(output, comparison.to_dict())
    if as_json:
        print_json(comparison.to_dict())
        return
    table = Table("figure", *comparison.models, "difference", "95 % interval", "")
    for name, gap in comparison.differences.items():
        interval = f"{gap.low:+.3g} to {gap.high:+.3g}"
        table.add_row(
            name, f"{gap.first:.4g}", f"{gap.second:.4g}", f"{gap.value:+.3g}", interval, "clear" if gap.clear else ""
        )
    console.print(table)
    console.print(f"page: {output}\nJSON: {output.with_suffix('.json')}")


def _write_json(output: Path, value: dict[str, Any]) -> None:
    from lmvae_fast.files import replacing, write_json

    with replacing(output.with_suffix(".json")) as temporary:
        write_json(temporary, value)


def _print(report: dict[str, Any]) -> None:
    from lmvae_fast.probes.meanings import meaning

    table = Table("probe", "figure", "value", "range")
    for name, section in report["sections"].items():
        for figure, score in section["scores"].items():
            if score["value"] is not None:
                spread = "" if score["spread"] is None else f" +- {score['spread']:.2g}"
                about = meaning(name, figure)
                table.add_row(name, about.title, f"{score['value']:.4g}{spread}", about.range)
    console.print(table)
    for name, why in report["skipped"].items():
        console.print(f"not run: {name} ({why})", markup=False)


def _factors(given: list[str] | None) -> dict[str, str | int] | None:
    from lmvae_fast.cli.common import column_name

    if not given:
        return None
    pairs = (item.partition("=") for item in given)
    return {name: column_name(column or name) for name, _, column in pairs}  # type: ignore[misc]
