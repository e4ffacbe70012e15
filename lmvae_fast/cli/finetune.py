"""Command ``lmvae-fast finetune``: a decoder by itself, on prompts with responses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmvae_fast.cli.common import Backend, DryRun, Json, console, merged
from lmvae_fast.cli.prompt_data import Layout, MaxPromptLen, TurnEnd, load_pairs, with_lengths
from lmvae_fast.cli.train import SECTIONS, finish

#: Epochs, rate and batch of the public code of CVAE with G-Skip, which clips nothing; the loss sums over a response's tokens.
RECIPE: dict[str, Any] = {
    "epochs": 3, "learning_rate": 1e-5, "batch_size": 64, "grad_clip": None, "beta_schedule": "constant",
}  # fmt: skip


def finetune(
    data: Annotated[str | None, typer.Option(help="Prompts with responses.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out ones; default: 10 % of the prompts, by seed.")] = None,
    layout: Layout = None,
    turn_end: TurnEnd = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many responses.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run: checkpoints, metrics, and `model/` at the end.")
    ] = None,
    decoder: Annotated[str | None, typer.Option(help="Hugging Face decoder: name or folder.")] = None,
    max_len: Annotated[int | None, typer.Option(help="Most tokens of a response, its end included.")] = None,
    max_prompt_len: MaxPromptLen = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters instead of the whole decoder.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Responses per batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(max=2**63 - 1, help="Of data order, dropout and adapters.")] = None,
    on_long: Annotated[str | None, typer.Option(help="Responses over max_len: truncate, drop or error.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Hold the decoder's layers in pieces, one on each process of torchrun.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON with sections model, train and data; flags override.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: --set model.lora_rank=16 (repeatable).")
    ] = None,
    dry_run: DryRun = False,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Fine-tune a decoder on prompts with responses, of which responses alone are predicted: whole, or by low-rank adapters.

    `OUTPUT/model` is an ordinary Hugging Face folder, adapters included in its weights (by themselves: `adapter/`): what
    `generate --prompts` answers with, and `train --system cvae` makes a conditional VAE of. Checkpoints, Ctrl-C, `--resume`
    and several processes are as with `train`.

    Example: `lmvae-fast finetune --data dialogues.txt --layout dailydialog --decoder gpt2 --output runs/sft`
    """
    values = merged(
        config, SECTIONS,
        {
            "model": {
                "decoder": decoder, "max_len": max_len, "max_prompt_len": max_prompt_len,
                "decoder_part": "lora" if lora else None,
            },
            "train": {
                "output_dir": output, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
                "learning_rate": lr, "precision": precision, "seed": seed, "on_long": on_long, "resume": resume or None,
                "shard": shard or None,
            },
            "data": {"path": data, "eval_path": eval_data, "layout": layout, "turn_end": turn_end, "limit": limit},
        },
        set_ or [],
    )  # fmt: skip
    from lmvae_fast.config import PlainDecoderConfig, TrainConfig

    values["train"] = {**RECIPE, **values["train"]}
    with_lengths(values)
    model_config = PlainDecoderConfig.from_dict(values["model"])
    train_config = TrainConfig.from_dict({**values["train"], **({"progress": False} if as_json else {})})

    from lmvae_fast.files import check_ours
    from lmvae_fast.models.plain_decoder import KIND, PlainDecoder
    from lmvae_fast.training.run_checks import check_run_folder

    check_run_folder(Path(train_config.output_dir))
    check_ours(Path(train_config.output_dir) / "model", KIND, replaced=True)
    train_data, held_out = load_pairs(
        values["data"], {**values["model"], "decoder": model_config.decoder}, train_config.seed
    )
    if not as_json:
        console.print(train_data.report, markup=False)
    finish(
        lambda: PlainDecoder(model_config), train_data, held_out, train_config, backend, as_json, unit="responses",
        dry_run=dry_run,
    )  # fmt: skip
