"""The application: commands, errors as messages, exit codes.

Exit codes: 0 done; 1 a fault of ours; 2 usage; 3 bad input (an LMVAEError: what is wrong, the limit, the remedy);
4 NaN or Inf in training; 130 interrupted, with a usable checkpoint where there is one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

import lmvae_fast
from lmvae_fast.cli import (
    convert,
    definitions,
    demo,
    env,
    evaluate,
    explore,
    finetune,
    generate,
    probe,
    profile,
    train,
)
from lmvae_fast.cli.common import BACKENDS, INTERRUPTED
from lmvae_fast.errors import ConfigError, LMVAEError, NumericalError

app = typer.Typer(
    name="lmvae-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Language-model VAEs, fast: train, decode and explore Hugging Face decoders steered by a latent.

Start with `lmvae-fast demo`: it trains a small LangVAE on a bundled corpus and writes an HTML report. Then
`lmvae-fast train --data sentences.txt --encoder ... --decoder ...` trains on your own sentences, and `generate`,
`interpolate`, `traverse` and `eval` work on the folder it wrote. Every command takes `--json`; `lmvae-fast env` says what
runs where, and why.""",
)

errors = Console(stderr=True)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    """Options before the command."""
    if version:
        print(lmvae_fast.__version__)
        raise typer.Exit()


# What a command needs is imported when it runs, so that --help waits for none of it.
COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo.demo,
    "train": train.train,
    "finetune": finetune.finetune,
    "generate": generate.generate,
    "interpolate": explore.interpolate,
    "traverse": explore.traverse,
    "arithmetic": explore.arithmetic,
    "neighbourhood": explore.neighbourhood,
    "average": explore.average,
    "eval": evaluate.evaluate,
    "fit-flow": definitions.fit_flow,
    "define": definitions.define,
    "probe": probe.probe,
    "env": env.env,
    "convert": convert.convert,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(profile.app, name="profile")


def main() -> None:
    """Entry point: runs a command and turns errors into messages and exit codes."""
    # The hub's own progress bars and the tokenizers' fork warning would tear ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    as_json = "--json" in sys.argv
    if as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if (forced := os.environ.get("LMVAE_BACKEND") or "auto") not in BACKENDS:
            raise ConfigError("LMVAE_BACKEND is no backend", value=forced, limit=", ".join(BACKENDS), remedy="unset it")
        app(standalone_mode=True)
    except LMVAEError as error:
        code = 4 if isinstance(error, NumericalError) else 3
        _report(error, as_json)
        sys.exit(code)
    except RuntimeError as error:
        from lmvae_fast.kernels.backend import BackendError  # not above: --help need not wait for torch

        if not isinstance(error, BackendError):
            raise
        _report(ConfigError(str(error), remedy="use --backend auto; `lmvae-fast env` says what runs here"), as_json)
        sys.exit(3)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        sys.stderr.close()
        sys.exit(0)


def _report(error: LMVAEError, as_json: bool) -> None:
    if as_json:
        fields = {"error": type(error).__name__, "problem": error.problem, "remedy": error.remedy}
        fields |= {name: str(value) for name in ("value", "limit") if (value := getattr(error, name)) is not None}
        print(json.dumps(fields), file=sys.stderr)
        return
    errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    errors.print(error.problem, markup=False, highlight=False)
    for name in ("value", "limit", "remedy"):
        if (value := getattr(error, name)) is not None:
            errors.print(f"  {name:>6}: {value}", markup=False, highlight=False)
