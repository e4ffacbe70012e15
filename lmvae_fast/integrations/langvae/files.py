"""The files of a LangVAE checkpoint folder, read and written without LangVAE and without unpickling anything.

What LangVAE 0.6.13 saves and expects:

==================  =================================================================================================
model_config.json   pythae's VAEConfig: ``latent_dim``, ``uses_default_encoder`` / ``_decoder`` false
environment.json    ``python_version`` as "major.minor"
encoder_cfg.json    ``model_path``, ``latent_size``, ``automodel_preset`` {cls, pooling_method, normalize}, ``caching``
encoder.pt          state dict: ``linear.weight`` [2 nz, h (+ A)], mu rows first
decoder_cfg.json    ``model_path``, ``latent_size``, ``max_len``, ``conditional``, ``device_map``
decoder.pt          state dict: ``context_hidden.<l>.weight`` [2 Hkv (max_len + 1) D, nz (+ A)], and ``.bias``
==================  =================================================================================================

Rows of ``context_hidden`` are ordered [K or V, kv head, slot, head_dim].
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.data.lines import check_inflated
from lmvae_fast.documents import check_regular, read_object
from lmvae_fast.errors import CheckpointError, LMVAEError, OutputError
from lmvae_fast.files import (
    check_ours,
    fsync_file,
    mark,
    replace_folder,
    share_as_folder,
    temporary_beside,
    write_json,
)
from lmvae_fast.integrations.langvae.legacy_parts import needs_legacy_copy, write_legacy_copy

FILES = ("model_config.json", "environment.json", "encoder_cfg.json", "encoder.pt", "decoder_cfg.json", "decoder.pt")
# The names of a folder that is written here, and what it is marked as: only such a folder is ever replaced.
CONTENTS = (*FILES, "encoder_model", "decoder_model")
KIND = "LangVAE checkpoint"
POOLINGS = ("mean", "cls", "last")
ENCODER_CLASSES = ("AutoModelForTextEncoding", "AutoModel")


@dataclass(frozen=True)
class LangVAEFolder:
    """Everything a LangVAE checkpoint folder says.

    Attributes:
        latent_dim: nz. max_len: tokens generated; there are ``max_len + 1`` memory slots.
        encoder_path, decoder_path: hub names or folders (absolute once read).
        pooling: ``mean``, ``cls`` or ``last``; normalize: L2 norm after pooling.
        encoder_class: how transformers loads the encoder: ``AutoModelForTextEncoding`` or ``AutoModel``.
        conditional: pooled labels are concatenated to z.
        caching: LangVAE's encoder keeps what it has pooled.
        posterior_weight: [2 nz, h (+ A)].
        projector_weight: [L, 2 Hkv (max_len + 1) D, nz (+ A)]; projector_bias: [L, 2 Hkv (max_len + 1) D].
    """

    latent_dim: int
    max_len: int
    encoder_path: str
    decoder_path: str
    posterior_weight: Tensor = field(repr=False)
    projector_weight: Tensor = field(repr=False)
    projector_bias: Tensor = field(repr=False)
    pooling: str = "mean"
    normalize: bool = False
    encoder_class: str = "AutoModelForTextEncoding"
    conditional: bool = False
    caching: bool = False

    @property
    def encoder_state(self) -> dict[str, Tensor]:
        """The state dict of ``encoder.pt``."""
        return {"linear.weight": self.posterior_weight.detach().cpu().contiguous().clone()}

    @property
    def decoder_state(self) -> dict[str, Tensor]:
        """The state dict of ``decoder.pt``."""
        state = {}
        for layer, (weight, bias) in enumerate(zip(self.projector_weight, self.projector_bias, strict=True)):
            # Cloned: torch.save would otherwise write the storage of all layers with each of them.
            state[f"context_hidden.{layer}.weight"] = weight.detach().cpu().clone()
            state[f"context_hidden.{layer}.bias"] = bias.detach().cpu().clone()
        return state


def read_folder(
    folder: str | os.PathLike[str], *, encoder: str | None = None, decoder: str | None = None
) -> LangVAEFolder:
    """Read and check a folder that LangVAE 0.6 saved.

    Args:
        folder: the checkpoint folder.
        encoder, decoder: hub names or folders to use in place of the recorded ``model_path``.
    Raises:
        CheckpointError: a file is missing, truncated, of another kind, or contradicts another; names it and the remedy.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError("no such checkpoint folder", value=str(root), remedy="check the path")
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        pickled = [name for name in ("encoder.pkl", "decoder.pkl", "model.pt") if (root / name).exists()]
        raise CheckpointError(
            f"{root} is not a complete LangVAE checkpoint",
            value=f"missing {', '.join(missing)}" + (f"; found {', '.join(pickled)}" if pickled else ""),
            limit=", ".join(FILES),
            remedy="save it again with LangVAE >= 0.6 (pickled pythae models are never loaded)"
            if pickled
            else "copy the missing files, or save the model again",
        )
    model_cfg, encoder_cfg, decoder_cfg = (
        _read_json(root / name) for name in ("model_config.json", "encoder_cfg.json", "decoder_cfg.json")
    )
    latent_dim = _entry(model_cfg, root / "model_config.json", "latent_dim", int)
    for name, cfg in (("encoder_cfg.json", encoder_cfg), ("decoder_cfg.json", decoder_cfg)):
        size = _entry(cfg, root / name, "latent_size", int)
        if size != latent_dim:
            raise CheckpointError(
                f"{root / name} contradicts model_config.json",
                value=f"latent_size {size}",
                limit=f"latent_dim {latent_dim}",
                remedy="the files are of two different models: copy all six from one folder",
            )
    max_len = _entry(decoder_cfg, root / "decoder_cfg.json", "max_len", int)
    conditional = _entry(decoder_cfg, root / "decoder_cfg.json", "conditional", bool, False)
    preset = _entry(encoder_cfg, root / "encoder_cfg.json", "automodel_preset", dict)
    pooling = _choice(preset, root / "encoder_cfg.json", "pooling_method", POOLINGS)
    encoder_class = _choice(preset, root / "encoder_cfg.json", "cls", ENCODER_CLASSES)
    normalize = _entry(preset, root / "encoder_cfg.json", "normalize", bool, False)

    posterior = _posterior_weight(root / "encoder.pt", latent_dim)
    weight, bias = _projector(root / "decoder.pt", latent_dim, max_len, conditional)
    encoder_path = encoder or _recorded(encoder_cfg, root, "encoder")
    decoder_path = decoder or _recorded(decoder_cfg, root, "decoder")
    return LangVAEFolder(
        latent_dim=latent_dim,
        max_len=max_len,
        encoder_path=_resolve(encoder_path, root, "encoder"),
        decoder_path=_resolve(decoder_path, root, "decoder"),
        posterior_weight=posterior,
        projector_weight=weight,
        projector_bias=bias,
        pooling=pooling,
        normalize=normalize,
        encoder_class=encoder_class,
        conditional=conditional,
        caching=_entry(encoder_cfg, root / "encoder_cfg.json", "caching", bool, False),
    )


def write_folder(contents: LangVAEFolder, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a folder that LangVAE 0.6.13 loads. It appears complete or not at all: temporary folder, fsync, rename.

    An encoder or decoder folder that LangVAE's transformers could not read is copied into the checkpoint in a form that
    it can (``legacy_parts.py``), and referred to there.

    Args:
        overwrite: replace a folder that this function wrote; otherwise one that is not empty is an error.
    Raises:
        OutputError: the folder exists, holds anything that was not written here, or cannot be written (read-only, full).
    """
    target = Path(folder).absolute()
    check_target(target, overwrite=overwrite)
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        encoder_path = _place_part(contents.encoder_path, "encoder_model", temporary, target)
        decoder_path = _place_part(contents.decoder_path, "decoder_model", temporary, target)
        write_json(
            temporary / "model_config.json",
            {
                "name": "VAEConfig",
                "input_dim": None,
                "latent_dim": contents.latent_dim,
                "uses_default_encoder": False,
                "uses_default_decoder": False,
                "reconstruction_loss": "mse",
            },
        )
        write_json(
            temporary / "environment.json",
            {"name": "EnvironmentConfig", "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}"},
        )
        preset = {
            "cls": contents.encoder_class,
            "pooling_method": contents.pooling,
            "normalize": contents.normalize,
        }
        write_json(
            temporary / "encoder_cfg.json",
            {
                "model_path": encoder_path,
                "latent_size": contents.latent_dim,
                "automodel_preset": preset,
                "caching": contents.caching,
            },
        )
        write_json(
            temporary / "decoder_cfg.json",
            {
                "model_path": decoder_path,
                "latent_size": contents.latent_dim,
                "max_len": contents.max_len,
                "conditional": contents.conditional,
                "device_map": None,
            },
        )
        for name, state in (("encoder.pt", contents.encoder_state), ("decoder.pt", contents.decoder_state)):
            torch.save(state, temporary / name)
        mark(temporary, KIND, complete=True)
        for path in temporary.rglob("*"):
            if path.is_file():
                share_as_folder(path)
            fsync_file(path)
        replace_folder(temporary, target)
    except LMVAEError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OutputError(
            f"cannot write checkpoint: {error}",
            value=str(target),
            remedy="check that the disk is writable and not full",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_target(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Before any work: a checkpoint can be written there. OutputError unless the folder is not there, is empty, or (with
    ``overwrite``) was written by :func:`write_folder` and holds nothing else."""
    target = Path(folder)
    check_ours(target, KIND, contents=CONTENTS)
    if not overwrite and target.exists() and any(target.iterdir()):
        raise OutputError("checkpoint folder exists", value=str(target), remedy="choose another, or overwrite=True")


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, error=CheckpointError)


_NEEDED = object()


def _entry(values: dict[str, Any], path: Path, name: str, kind: type, default: Any = _NEEDED) -> Any:
    value = values.get(name, default)
    good = value is default or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
    if value is _NEEDED or not good:
        raise CheckpointError(
            f"{path}: field {name!r} is missing or of the wrong type",
            value="missing" if value is _NEEDED else repr(value),
            limit=kind.__name__,
            remedy="this is not a file of LangVAE 0.6, or it was edited",
        )
    if kind is int and value < 1:
        raise CheckpointError(f"{path}: field {name!r} is out of range", value=value, limit=">= 1")
    return value


def _choice(values: dict[str, Any], path: Path, name: str, allowed: tuple[str, ...]) -> str:
    value = _entry(values, path, name, str, allowed[0])
    if value not in allowed:
        raise CheckpointError(
            f"{path}: unknown {name}",
            value=value,
            limit=", ".join(allowed),
            remedy="it was made by another version of LangVAE than 0.6",
        )
    return value


def _load_state(path: Path) -> dict[str, Tensor]:
    check_regular(path, error=CheckpointError)
    try:
        check_inflated(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have errors of many kinds
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} is truncated, corrupt or holds more than tensors (nothing is unpickled)",
            value=reason[0] if reason else type(error).__name__,
            limit="a state dict saved by torch.save",
            remedy="copy the file again from the source",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} does not hold a state dict", value=type(state).__name__, limit="names mapped to tensors"
        )
    for name, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {name} is no dense tensor of floats", value=f"{value.dtype} {value.layout}",
                remedy="save it again dequantised and dense",
            )  # fmt: skip
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} has NaN or infinite entries", remedy="use an earlier checkpoint")
    return state


def _posterior_weight(path: Path, latent_dim: int) -> Tensor:
    state = _load_state(path)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    weight = state.get("linear.weight")
    if set(state) != {"linear.weight"} or weight is None or weight.dim() != 2 or weight.shape[0] != 2 * latent_dim:
        raise CheckpointError(
            f"{path} is not the encoder of a LangVAE with latent_dim {latent_dim}",
            value=shapes,
            limit=f"linear.weight [{2 * latent_dim}, encoder width]",
            remedy="copy encoder.pt and the *.json files from the same folder",
        )
    return weight


def _projector(path: Path, latent_dim: int, max_len: int, conditional: bool) -> tuple[Tensor, Tensor]:
    state = _load_state(path)
    layers = len({match[1] for name in state if (match := re.fullmatch(r"context_hidden\.(\d+)\.(weight|bias)", name))})
    names = {f"context_hidden.{layer}.{part}" for layer in range(layers) for part in ("weight", "bias")}
    shapes = {tuple(value.shape) for name, value in state.items() if name.endswith("weight")}
    rows, columns = next(iter(shapes)) if len(shapes) == 1 and len(next(iter(shapes))) == 2 else (0, 0)
    good = layers > 0 and set(state) == names and rows > 0 and rows % (2 * (max_len + 1)) == 0
    good = good and (columns > latent_dim if conditional else columns == latent_dim)
    good = good and all(tuple(state[f"context_hidden.{layer}.bias"].shape) == (rows,) for layer in range(layers))
    if not good:
        raise CheckpointError(
            f"{path} is not the decoder of a LangVAE with latent_dim {latent_dim} and max_len {max_len}",
            value={name: tuple(value.shape) for name, value in list(state.items())[:4]},
            limit=f"context_hidden.<layer>.weight [2 * kv_heads * head_dim * {max_len + 1}, "
            f"{latent_dim}{' + labels' if conditional else ''}] and .bias for layers 0, 1, ...",
            remedy="copy decoder.pt and the *.json files from the same folder",
        )
    weights = torch.stack([state[f"context_hidden.{layer}.weight"] for layer in range(layers)])
    biases = torch.stack([state[f"context_hidden.{layer}.bias"] for layer in range(layers)])
    return weights, biases


def _place_part(path: str, name: str, temporary: Path, target: Path) -> str:
    """Place where LangVAE finds an encoder or decoder: as given, or as a legacy copy inside the checkpoint."""
    if not (Path(path).is_dir() and needs_legacy_copy(Path(path))):
        return path
    write_legacy_copy(Path(path), temporary / name)
    return str(target / name)


def _recorded(cfg: dict[str, Any], root: Path, part: str) -> str:
    """Recorded ``model_path``; a copy inside the checkpoint is found also when the checkpoint was moved."""
    path = _entry(cfg, root / f"{part}_cfg.json", "model_path", str)
    inside = root / f"{part}_model"
    return str(inside) if Path(path).name == inside.name and inside.is_dir() else path


def _resolve(path: str, root: Path, part: str) -> str:
    """A folder relative to the checkpoint (or to the working directory, as LangVAE reads it), else a hub name."""
    for candidate in (root / Path(path).expanduser(), Path(path).expanduser()):
        if candidate.is_dir():
            return str(candidate.resolve())
    if path.startswith((".", "/", "~")):
        raise CheckpointError(
            f"the {part} folder named in {part}_cfg.json does not exist",
            value=path,
            limit=f"a folder, absolute or relative to {root}",
            remedy=f"pass {part}=<folder or hub name>",
        )
    return path
