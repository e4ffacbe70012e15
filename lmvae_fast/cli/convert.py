"""Command ``lmvae-fast convert``: between our model folders and LangVAE's checkpoints, and from Optimus's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmvae_fast.cli.common import DryRun, Json, console, load_model, print_json, show_estimate
from lmvae_fast.errors import ConfigError, OutputError


def convert(
    source: Annotated[
        Path, typer.Argument(help="A LangVAE 0.6 or Optimus checkpoint folder, or a model folder of ours.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="lmvae_fast or langvae.")] = "lmvae_fast",
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder in place of the recorded one; of an Optimus: its BERT (bert-base-cased)."),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Decoder in place of the recorded one; of an Optimus: its GPT-2 (gpt2).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a target that an earlier conversion wrote.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a LangVAE checkpoint to a model folder, or back, or an Optimus checkpoint to a model folder.

    Nothing but tensors and plain values is unpickled.

    Example: `lmvae-fast convert langvae_checkpoint/ model/`
    """
    from lmvae_fast.integrations import optimus
    from lmvae_fast.integrations.langvae import load_checkpoint, save_checkpoint
    from lmvae_fast.integrations.langvae.files import check_target
    from lmvae_fast.models.serialization import check_model_folder

    if to not in ("lmvae_fast", "langvae"):
        raise ConfigError("--to", value=to, limit="lmvae_fast, langvae")
    if to == "langvae":
        check_target(target, overwrite=overwrite)
    else:
        check_model_folder(target)
        if target.exists() and any(target.iterdir()) and not overwrite:
            raise OutputError(f"{target} exists", remedy="choose another target, or --overwrite a model of ours")
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise OutputError("the target would replace the source", value=target, remedy="choose another target")
    given = {"encoder": encoder, "decoder": decoder}
    parts: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if (source / "decoder_cfg.json").is_file():
        model = load_checkpoint(source, **parts)
    elif optimus.is_optimus(source):
        model = optimus.load_checkpoint(source, **parts)
    else:
        if encoder is not None or decoder is not None:
            raise ConfigError(
                "--encoder and --decoder are about what a checkpoint refers to, and a model of ours holds it",
                value=source, limit="a LangVAE or Optimus checkpoint folder", remedy="leave them out",
            )  # fmt: skip
        model = load_model(source, device="cpu")
    if dry_run:
        show_estimate(_estimate(model, target, to), model, as_json)
        return
    if to == "langvae":
        save_checkpoint(model, target, overwrite=overwrite)
    else:
        model.save_pretrained(target)
    if as_json:
        print_json({"source": str(source), "target": str(target), "format": to})
    else:
        console.print(f"{source} -> {target} ({to})")


def _estimate(model: Any, target: Path, to: str) -> dict[str, Any]:
    """What the target would take on its disk: the weights that train, and the parts that no hub name restores."""
    from lmvae_fast.memory import free_disk

    written = {"weights": sum(value.numel() * value.element_size() for value in model.trainable_state_dict().values())}
    for name in ("encoder", "decoder"):
        part = getattr(model, name)
        source = getattr(part, "source", None)
        if hasattr(part, "model") and (source is None or Path(source).exists()):
            written[name] = sum(value.numel() * value.element_size() for value in part.model.state_dict().values())
    return {
        "format": to,
        "stored": ", ".join(written),
        "disk_bytes": sum(written.values()),
        "disk_free": free_disk(target),
    }
