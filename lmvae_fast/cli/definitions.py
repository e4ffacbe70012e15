"""Commands ``lmvae-fast fit-flow`` and ``define``, and what ``eval --definitions`` does: words to glosses through a flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lmvae_fast.cli.common import (
    INTERRUPTED,
    Backend,
    DryRun,
    Json,
    Model,
    SamplingOptions,
    console,
    load_model,
    merged,
    notice,
    print_json,
    show_estimate,
    takes_sampling,
)
from lmvae_fast.cli.definition_data import (
    FIT,
    known_part,
    read_data,
    read_fit,
    read_parts,
    read_vectors,
    vector_source,
    vectors_are_the_definitions,
)
from lmvae_fast.errors import ConfigError

if TYPE_CHECKING:
    from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE

SECTIONS = ("flow", "train", "data")

PARTS = ("train", "valid", "test", "all")

Vectors = Annotated[
    str | None,
    typer.Option(
        help="Word vectors: `glove`, `encoder` and `decoder` (the model's own), or a file (text, npy, npz, safetensors, CODWOE's json)."  # noqa: E501
    ),
]
Skip = Annotated[bool, typer.Option("--skip-missing", help="Leave words without a vector out, and count them.")]
Flow = Annotated[Path, typer.Argument(help="Folder that `fit-flow` wrote.")]


def fit_flow(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Definitions: tsv, csv, jsonl, or CODWOE's json.")] = None,
    valid: Annotated[
        str | None,
        typer.Option(help="Definitions to stop by, where they come in parts: nothing is then parted or held out."),
    ] = None,
    vectors: Vectors = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run: checkpoints, metrics, and `flow/` at the end.")
    ] = None,
    word_column: Annotated[
        str | None, typer.Option(help="Column or field with the word; default: word, lemma, term.")
    ] = None,
    gloss_column: Annotated[str | None, typer.Option(help="With the gloss; default: definition, gloss.")] = None,
    pos_column: Annotated[str | None, typer.Option(help="With the label (part of speech); default: pos.")] = None,
    field: Annotated[str | None, typer.Option(help="Of CODWOE's vectors: sgns, char or electra.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many definitions.")] = None,
    shares: Annotated[str, typer.Option(help="Of the words to fit to, to stop by, and to hold out.")] = "0.8,0.1,0.1",
    whole: Annotated[
        bool,
        typer.Option(
            "--all", help="Fit to all definitions, held-out ones too: Flow(all). To stop by: `--valid` alone."
        ),
    ] = False,
    skip_missing: Skip = False,
    kind: Annotated[str | None, typer.Option(help="Of the blocks: coupling, allinone or glow.")] = None,
    blocks: Annotated[int | None, typer.Option(help="How many.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the subnets' hidden layer.")] = None,
    base: Annotated[str | None, typer.Option(help="Base density: posterior, standard or cluster.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the definitions.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Definitions per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    early_stop: Annotated[int | None, typer.Option(help="Evaluations without progress before stopping.")] = None,
    seed: Annotated[
        int | None, typer.Option(max=2**63 - 1, help="Of the split, the flow's start and the order.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON with sections flow, train and data; flags override.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: --set flow.permutation=soft (repeatable).")
    ] = None,
    dry_run: DryRun = False,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Fit the flow of an Invertible CVAE: from word vectors to the latents of a trained model.

    The words are parted at random (`--shares`, `--seed`), all glosses of a word in one part: the first part is fitted to,
    the second decides which flow is kept, the third is for `eval --definitions`. The flow is in `OUTPUT/flow`. A file of
    definitions that has the vectors, too (CODWOE's json), is also named by `--vectors`; those of `--valid` are then its own.

    Example: `lmvae-fast fit-flow runs/vae --data definitions.tsv --vectors glove --skip-missing --output runs/flow`
    """
    values = merged(
        config, SECTIONS,
        {
            "flow": {"kind": kind, "blocks": blocks, "hidden": None if hidden is None else (hidden,), "base": base},
            "train": {
                "output_dir": output, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": lr,
                "early_stop": early_stop, "seed": seed, "resume": resume or None,
            },
            "data": {
                "path": data, "eval_path": valid, "vectors": vectors, "field": field, "limit": limit,
                "word_column": word_column, "gloss_column": gloss_column, "pos_column": pos_column,
            },
        },
        set_ or [],
    )  # fmt: skip
    from lmvae_fast.config import FlowConfig, FlowTrainConfig

    for name in ("path", "eval_path", "vectors"):  # which hold wherever one goes
        given = values["data"].get(name)
        if given is not None and Path(given).is_file():
            values["data"][name] = str(Path(given).resolve())
    train_config = FlowTrainConfig.from_dict({**values["train"], **({"progress": False} if as_json else {})})
    flow_config = FlowConfig.from_dict(values["flow"])
    parts = read_parts(values["data"], shares, train_config.seed, whole)
    if parts.get("valid") is None and (train_config.schedule == "plateau" or train_config.early_stop is not None):
        raise ConfigError(
            "schedule='plateau' and early_stop go by the NLL of validation definitions, and --all leaves none",
            value=f"schedule={train_config.schedule!r}, early_stop={train_config.early_stop}",
            remedy="name a file of them with --valid, or leave --all out",
        )  # fmt: skip

    import torch

    from lmvae_fast.kernels.backend import backend as use_backend
    from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE

    folder = Path(train_config.output_dir)
    with use_backend(backend):
        vae = load_model(model)
        torch.manual_seed(train_config.seed)
        fitted = InvertibleCVAE(vae, flow_config, source=model_folder(model))  # refuses a VAE before vectors are read
        fitted.vectors = read_vectors(values["data"], vae)
        fitted_to = parts["train"]
        missing = "skip" if skip_missing else "error"
        if dry_run:
            from lmvae_fast.training.estimates import estimate_fit

            show_estimate(estimate_fit(fitted, fitted_to, train_config, missing=missing), fitted, as_json)
            return
        result = fitted.fit(fitted_to, valid=parts.get("valid"), config=train_config, missing=missing)
        fitted.save_pretrained(folder / "flow")
    (folder / FIT).write_text(json.dumps({
        "data": values["data"], "shares": shares, "seed": train_config.seed, "all": whole,
        "definitions": parts["all"].fingerprint(),
        "valid": parts["valid"].fingerprint() if values["data"].get("eval_path") else None,
    }, indent=2) + "\n")  # fmt: skip
    summary = {
        "stopped": result.stop_reason, "step": result.step, "epoch": round(result.epoch, 3), "seconds": result.seconds,
        "definitions": len(fitted_to), "skipped": result.skipped, "best": result.best, "flow": str(folder / "flow"),
        "checkpoint": str(result.checkpoint), "parameters": fitted.flow.theta.numel(),
    }  # fmt: skip
    if as_json:
        print_json(summary)
    else:
        left_out = f", {result.skipped} of them left out for want of a vector" if result.skipped else ""
        console.print(f"fitted to {len(fitted_to)} definitions{left_out}; {result.stop_reason} at step {result.step}")
        console.print(f"best evaluation: {result.best}", markup=False)
        console.print(f"flow: {folder / 'flow'}")
    if result.interrupted:
        notice("continue with --resume")
        raise typer.Exit(INTERRUPTED)


@takes_sampling
def define(
    flow: Flow,
    words: Annotated[list[str], typer.Argument(help="Words to define.")],
    samples: Annotated[int, typer.Option(help="Glosses drawn per word.")] = 1,
    vectors: Vectors = None,
    condition: Annotated[str | None, typer.Option(help="Label of all words, for a conditional flow (n, say).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens per gloss; default: the model's max_len.")
    ] = None,
    skip_missing: Skip = False,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Define words: their vectors through the flow to latents, and those decoded.

    Example: `lmvae-fast define runs/flow planet river --samples 3`
    """
    if samples < 1:
        raise ConfigError("--samples is out of range", value=samples, limit=">= 1")
    from lmvae_fast.generation.estimates import check_estimate, estimate
    from lmvae_fast.kernels.backend import backend as use_backend

    with use_backend(backend):
        model = load_flow(flow)
        source = None if vectors is None else vector_source(vectors, model.vae, None)
        drawn = SamplingOptions(**{**vars(sampling), "sample": sampling.sample or samples > 1})
        config = drawn.config(max_new_tokens=max_new_tokens, num_samples=samples)
        check_estimate(
            estimate(len(words), config, model.vae.config.max_len, None, text_only=False), None, as_json=as_json
        )
        options = config.to_dict()
        found = model.define(
            words, vectors=source, conditions=None if condition is None else [condition] * len(words),
            missing="skip" if skip_missing else "error", **options,
        )  # fmt: skip
    glosses = [(word, [text] if isinstance(text, str) else text) for word, text in zip(words, found, strict=True)]
    missing = list(dict.fromkeys(word for word, texts in glosses if texts is None))
    if as_json:
        entries = [{"word": word, "glosses": texts} for word, texts in glosses if texts is not None]
        print_json({"words": entries, "missing": missing})
        return
    for word, texts in glosses:
        for text in texts or []:
            console.print(f"{word}: {text}", markup=False, highlight=False)
    if missing:
        console.print(f"without a vector: {', '.join(missing)}", style="yellow", markup=False)


def evaluate(
    flow: Path, data: str | None, *, part: str, limit: int | None, metrics: str, mover_model: str | None, skip_missing: bool,
    seed: int, batch_size: int, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """What ``eval --definitions`` does: the figures of a flow on a part of the definitions."""
    from lmvae_fast.probes.definition_evaluation import METRICS, evaluate_definitions

    if part not in PARTS:
        raise ConfigError("unknown part", value=part, limit=", ".join(PARTS))
    known = read_fit(flow)
    if data is None and known is None:
        raise ConfigError("no definitions", remedy="name a file, or a folder that fit-flow wrote")
    if known is None and part != "all":
        raise ConfigError(
            "this folder does not say how its definitions were parted", value=f"--part {part}", remedy="use --part all"
        )
    options = dict(known["data"]) if known else {}
    own = known is not None and vectors_are_the_definitions(options)
    if known is not None and options.get("eval_path") and part in ("valid", "test"):
        if part == "test":
            raise ConfigError(
                "the definitions that this flow was fitted to came in parts, and none of them is a test part",
                value="--part test", limit="train, valid, all", remedy="name the file of the test part, and --part all",
            )  # fmt: skip
        options["path"] = options["eval_path"]
    options |= {"path": data} if data else {}
    if limit is not None:
        options["limit"] = limit if known is None else options.get("limit")
    definitions = read_data(options)
    if known is not None and part != "all":
        definitions = known_part(definitions, known, part)
    if limit is not None:
        definitions = definitions[:limit]
    default = tuple(name for name in METRICS if name != "mover_score" or mover_model)
    chosen = default if metrics == "all" else tuple(name.strip() for name in metrics.split(","))
    model = load_flow(flow)
    # Vectors that come with definitions are of no other file's words.
    vectors = vector_source(str(data), model.vae, options.get("field")) if own and data else None
    found = evaluate_definitions(
        model, definitions, vectors, metrics=chosen, missing="skip" if skip_missing else "error", mover_model=mover_model,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
    if report is not None:
        from lmvae_fast.reports.definitions import write_definition_report

        write_definition_report(found, report, title=f"Definitions by {flow}")
    if as_json:
        print_json({**found.to_dict(), "part": part})
        return
    table = Table("figure", "value")
    for name, score in found.figures.items():
        table.add_row(name, f"{float(score):,.4f}")
    console.print(f"{found.pairs} definitions of {found.words} words ({part}); {found.skipped} left out", markup=False)
    console.print(table)
    for entry in found.examples(5):
        console.print(f"{entry['word']}: {entry['generated']}  [{'; '.join(entry['glosses'])}]", markup=False)


def model_folder(source: Path) -> str:
    """Where a model's files are: a training run keeps them in a subfolder."""
    return str(source / "model" if (source / "model" / "config.json").is_file() else source)


def load_flow(folder: Path) -> InvertibleCVAE:
    """The InvertibleCVAE of a folder that fit-flow (or save_pretrained) wrote."""
    import torch

    from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE

    model = InvertibleCVAE.from_pretrained(folder / "flow" if (folder / "flow" / "config.json").is_file() else folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
