"""Parts that several commands share: options, configuration merging, output."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from lmvae_fast.config.base import read_mapping
from lmvae_fast.documents import parse_yaml, read_object
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.limits import whole_number


class Terminal(Console):
    """A console that prints texts as they are, markup and all, and leaves long lines of them to the terminal to wrap."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """The reader has gone (head, say), which is how it ends and no failure; rich would exit with 1."""
        raise BrokenPipeError

    def print(self, *objects: Any, **options: Any) -> None:
        """As Console does."""
        if all(isinstance(part, str) for part in objects):
            options.setdefault("soft_wrap", True)
        # half characters, of names that are no UTF-8, would fail in the stream and stay in the console's buffer
        shown = [
            part.encode("utf-8", "backslashreplace").decode() if isinstance(part, str) else part for part in objects
        ]
        super().print(*shown, **options)


console = Terminal()

#: Exit codes: of bad input; after Ctrl-C or SIGTERM, with a usable checkpoint where there is one.
BAD_INPUT, INTERRUPTED = 3, 130

# Standard output, while everything but the JSON document goes to standard error.
_documents: list[TextIO] = []

BACKENDS = ("auto", "reference", "cpp", "triton", "flash", "cuda")


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(BACKENDS)}")
    return name


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[Path, typer.Argument(help="Folder of a trained model (or a Hugging Face hub name).")]
Backend = Annotated[
    str,
    typer.Option(
        "--backend", help=f"Kernels to use: {', '.join(BACKENDS)}.", envvar="LMVAE_BACKEND", callback=_known_backend
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take (sizes, memory, disk), and stop there.")
]
Seed = Annotated[int | None, typer.Option(max=2**63 - 1, help="Of everything random.")]
Greedy = typer.Option("--sample/--greedy", help="Draw tokens instead of taking the most probable.")


@dataclass(frozen=True)
class SamplingOptions:
    """Options of how a command's sentences are decoded; :func:`takes_sampling` puts these fields into its options."""

    sample: Annotated[bool, Greedy] = False
    temperature: Annotated[float, typer.Option(help="Of the draw.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Draw among the K most probable tokens; 0 for all.")] = 0
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens that reach this probability.")] = 1.0
    seed: Seed = 0

    def config(self, **other: Any) -> Any:
        """The GenerationConfig; ``other`` are further fields of it."""
        from lmvae_fast.config import GenerationConfig

        return GenerationConfig(
            do_sample=self.sample, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            seed=self.seed if self.sample else None, **other,
        )  # fmt: skip


def takes_sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the fields of SamplingOptions as options, in the place of its parameter ``sampling``."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(SamplingOptions, eval_str=True).parameters
    merged_parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        merged_parameters += shared.values() if name == "sampling" else [parameter]

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        sampling = SamplingOptions(**{name: options.pop(name) for name in shared})
        return command(sampling=sampling, **options)

    run.__signature__ = inspect.Signature(merged_parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in merged_parameters}
    return run


def column_name(column: str | int | None) -> str | int | None:
    """A column as it is given on a command line: its number from 0, or its name."""
    number = whole_number(column) if isinstance(column, str) else None
    return column if number is None else number


def read_sentences(data: str, column: str | None = None, limit: int | None = None, **reading: Any) -> Any:
    """The sentences of a file; of the word ``corpus``, the part of the bundled corpus that ``lmvae-fast train --data corpus``
    and the demonstration hold out under seed 0. ``reading``: further options of ``lmvae_fast.read``."""
    from lmvae_fast.data import generate_corpus, read

    if data == "corpus":
        sentences = generate_corpus(20000, seed=0).split(held_out=0.1, seed=0)[1]
        return sentences[:limit] if limit else sentences
    options = {"column": column_name(column), "limit": limit, **reading}
    return read(data, **{name: value for name, value in options.items() if value is not None})


def show_estimate(found: dict[str, Any], model: Any, as_json: bool) -> None:
    """What a dry run says: the estimate, and what the model takes."""
    held = sum(part.numel() * part.element_size() for part in model.parameters())
    found = {**found, "parameters": sum(part.numel() for part in model.parameters()), "model_bytes": held}
    if as_json:
        print_json({"dry_run": True, **found})
        return
    for name, value in found.items():
        if name.endswith(("bytes", "free")) and value is not None:
            value = f"{value / 1e6:,.1f} MB"
        console.print(f"{name.replace('_', ' ')}: {f'{value:,}' if isinstance(value, (int, float)) else value}")


def notice(text: str) -> None:
    """What a reader of the terminal should know, on standard error."""
    Terminal(stderr=True).print(text, style="yellow")


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN and Inf, which JSON has not, become null."""
    try:
        text = json.dumps(value, indent=2, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(value), indent=2, default=str)
    stream = _documents[-1] if _documents else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def documents_only(wanted: bool) -> Iterator[None]:
    """Within the block, if wanted, standard output gets what :func:`print_json` prints and nothing else."""
    if not wanted:
        yield
        return
    _documents.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.pop()


def load_model(source: Path | str, device: str | None = None):
    """The model in a folder (ours, or a LangVAE checkpoint) or of a hub name, in evaluation mode."""
    import torch

    from lmvae_fast.models.lmvae import LMVAE

    folder = Path(source)
    if (folder / "decoder_cfg.json").is_file():
        from lmvae_fast.integrations.langvae import load_checkpoint

        model = load_checkpoint(folder)
    else:
        # A training run keeps its model in a subfolder.
        model = LMVAE.from_pretrained(folder / "model" if (folder / "model" / "config.json").is_file() else source)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_generator(source: Path | str, device: str | None = None, *, max_prompt_len: int | None = None):
    """What :func:`load_model` loads, or the decoder without a latent of an ordinary Hugging Face folder."""
    import torch

    folder = Path(source)
    inside = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if not _is_decoder(inside):
        return load_model(source, device)
    from lmvae_fast.models.plain_decoder import PlainDecoder

    limits = {} if max_prompt_len is None else {"max_prompt_len": max_prompt_len}
    model = PlainDecoder.from_pretrained(inside, **limits)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _is_decoder(folder: Path) -> bool:
    """Whether a folder is an ordinary Hugging Face one: its configuration names a kind of model, and is not ours."""
    try:
        config = read_object(folder / "config.json")
    except DataError:
        return False
    return "model_type" in config and "format" not in config


def merged(config: Path | None, sections: tuple[str, ...], flags: dict[str, dict[str, Any]], sets: list[str]):
    """Configuration by section: the file's, then the flags that were given, then ``--set section.field=value``.

    Raises ConfigError for a section or a --set that does not exist.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    if config is not None:
        for section, fields in read_mapping(config).items():
            if section not in values or not isinstance(fields, dict):
                raise ConfigError(
                    f"{config} has an unknown section", value=section, limit=", ".join(sections),
                    remedy="put fields below one of these",
                )  # fmt: skip
            values[section].update(fields)
    for section, fields in flags.items():
        values[section].update({name: value for name, value in fields.items() if value is not None})
    for item in sets:
        name, separator, text = item.partition("=")
        section, dot, field = name.partition(".")
        if not separator or not dot or section not in values:
            raise ConfigError(
                "--set wants section.field=value", value=item, limit=f"sections {', '.join(sections)}",
                remedy="for example --set train.grad_clip=0.5",
            )  # fmt: skip
        values[section][field] = parse_yaml(text, f"--set {name}, which wants a YAML value,")
    return values
