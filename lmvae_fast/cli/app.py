"""The application: its commands. How they end, and their exit codes, are in ``ending``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

import lmvae_fast
from lmvae_fast.cli import (
    cache,
    convert,
    definitions,
    demo,
    env,
    evaluate,
    explore,
    finetune,
    generate,
    guide,
    probe,
    profile,
    train,
    verify,
)
from lmvae_fast.cli.common import BACKENDS
from lmvae_fast.cli.ending import ending, guarded, prepare_streams, report_usage, wants_json
from lmvae_fast.errors import ConfigError

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
    "guide": guide.guide,
    "eval": evaluate.evaluate,
    "fit-flow": definitions.fit_flow,
    "define": definitions.define,
    "probe": probe.probe,
    "env": env.env,
    "convert": convert.convert,
    "verify": verify.verify,
}
for name, command in COMMANDS.items():
    app.command(name)(guarded(command))
for name, group in {"profile": profile.app, "cache": cache.app}.items():
    for info in group.registered_commands:
        info.callback = guarded(info.callback) if info.callback else None
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point: runs a command; errors become messages and exit codes."""
    # The hub's own progress bars and the tokenizers' fork warning would tear ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prepare_streams()
    as_json = wants_json()
    if as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with ending(as_json):
        if (forced := os.environ.get("LMVAE_BACKEND") or "auto") not in BACKENDS:
            raise ConfigError("LMVAE_BACKEND is no backend", value=forced, limit=", ".join(BACKENDS), remedy="unset it")
        if not as_json:
            app(standalone_mode=True)
            return
        try:
            code = app(standalone_mode=False)
        except Exception as error:  # click's, of whichever copy of it typer brings
            if not report_usage(error):
                raise
            code = getattr(error, "exit_code", 2)
        sys.exit(code if isinstance(code, int) else 0)
