"""Model folders: safetensors and JSON, nothing pickled, nothing half written.

This file knows a configuration, named tensors and two parts; the model that they make builds itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError, ConfigError, OutputError
from lmvae_fast.files import (
    check_contents,
    check_ours,
    files_inside,
    fsync_file,
    list_of_files,
    recover_folder,
    replace_folder,
    sha256_file,
    share_as_folder,
    temporary_beside,
)
from lmvae_fast.models import frozen_parts
from lmvae_fast.models.decoder.tuning import into_weights, without_adapters
from lmvae_fast.models.sharded_tensors import in_pieces, whole
from lmvae_fast.tensor_files import check_finite, check_floating, read_headers, read_tensors
from lmvae_fast.text.tokenizer import SentenceTokenizer, without_state

CONFIG, WEIGHTS, CARD, FORMAT = "config.json", "model.safetensors", "README.md", "lmvae_fast-1"
MODEL_TYPE = "lmvae"  # by which transformers' Auto classes know a folder of ours (integrations/hub)
CONTENTS = (CONFIG, WEIGHTS, CARD, "encoder", "decoder")
_FILES = "files"  # what lies in the parts' folders: nothing else is replaced
_FROZEN = "frozen_sha256"  # by part that is not stored: a fingerprint of its frozen weights
HEADER = (
    "format",
    "model_type",
    "weights_sha256",
    _FROZEN,
    _FILES,
)  # what stands beside the configuration's own fields

_CARD = """---
library_name: lmvae_fast
tags: [variational-autoencoder, text-generation]
---
# A language-model VAE ({system})

Encoder `{encoder}`, decoder `{decoder}`, latent dimension {latent_dim}, {visibility} visibility.

```python
import lmvae_fast as lf
model = lf.LMVAE.from_pretrained("<this folder or hub name>")
posterior = model.encode(["a cat is a kind of animal"])
print(model.decode(posterior.mu))
```
"""


def save_model(
    folder: str | os.PathLike[str],
    config: LMVAEConfig,
    trained: Mapping[str, Tensor],
    parts: Mapping[str, Any],
    *,
    include_frozen: bool | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors``, a model card, and the parts that a name cannot restore.

    A model in pieces (``TrainConfig.shard``) is saved by all processes together; the first one writes.

    Args:
        folder: made, or replaced if it holds a model of ours. Written beside its place first and renamed when complete.
        config: of the model.
        trained: what trains, by name.
        parts: ``encoder`` and ``decoder``.
        include_frozen: store both whole in subfolders; default: those that did not come from a hub name, or are no longer
            what that name stands for (a decoder that an earlier stage trained).

    Raises:
        OutputError: the folder cannot be written, or holds something else. ConfigError: ``include_frozen=False`` would lose
            weights of a part.
    """
    sharded = any(in_pieces(parameter) for part in parts.values() for parameter in part.parameters())
    if sharded:  # no process has a part whole: what is not as its source has it is stored with what trains
        trained = {**trained, **_replaced(parts)}
    state = {name: whole(value).cpu().contiguous() for name, value in trained.items()}
    if sharded and torch.distributed.get_rank() != 0:
        return
    folder = Path(folder)
    another = {name: not sharded and frozen_parts.changed(name, part, state) for name, part in parts.items()}
    for name in (name for name, differs in another.items() if differs and include_frozen is False):
        raise ConfigError(
            f"the {name} has other weights than the one it is named after, which would be lost",
            value=f"include_frozen=False with {name}={parts[name].source}",
            remedy="leave include_frozen unset, which stores it, or set it to True",
        )
    check_model_folder(folder)
    temporary = temporary_beside(folder.absolute())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write to {folder.parent}: {error}", remedy="choose a writable folder") from error
    try:
        frozen = {}
        for name, part in parts.items():
            if another[name] or _stored(part, include_frozen):
                _store_part(part, temporary / name)
                config = config.replace(**{name: f"./{name}"})
            elif not sharded:
                frozen[name] = frozen_parts.record(name, part, config, state)
        save_file(state, temporary / WEIGHTS, metadata={"format": FORMAT})
        header: dict[str, Any] = {
            "format": FORMAT,
            "model_type": MODEL_TYPE,
            "weights_sha256": sha256_file(temporary / WEIGHTS),
        }
        header |= {_FROZEN: frozen} if frozen else {}
        header[_FILES] = [name for name in files_inside(temporary) if "/" in name]
        (temporary / CONFIG).write_text(json.dumps({**header, **config.to_dict()}, indent=2) + "\n")
        (temporary / CARD).write_text(_CARD.format(**config.to_dict()))
        for file in temporary.rglob("*"):
            if file.is_file():
                share_as_folder(file)
                fsync_file(file)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder}: {error}", remedy="free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_model_folder(folder: str | os.PathLike[str]) -> None:
    """Before any work: a model can be saved there. Raises OutputError unless the folder is not there, is empty, or holds a
    model of ours and nothing else, which will be replaced."""
    folder = Path(folder)
    recover_folder(folder)
    if folder.is_dir() and holds_model(folder):
        check_written(folder)
    else:
        check_ours(folder, "model")


def check_written(folder: Path, *, beside: bool = False) -> None:
    """OutputError where a folder with a model of ours holds something else, within its parts' folders too; beside: what lies
    beside the model's own files and folders may be anything."""
    files = list_of_files(read_object(folder / CONFIG, error=CheckpointError).get(_FILES))
    if not beside:
        check_contents(folder, CONTENTS, files)
        return
    for part in (folder / "encoder", folder / "decoder"):
        within = None if files is None else [name.removeprefix(f"{part.name}/") for name in files]
        check_contents(part, None, within)


@dataclass(frozen=True)
class StoredModel:
    """What a folder holds of a model.

    ``config`` as it was saved, ``wanted`` with the fields that were asked for in place of the saved ones (parts that lie in the
    folder by their whole path); ``state``: what trained, by name; ``frozen``: fingerprints of parts that were not stored.
    """

    config: LMVAEConfig
    wanted: LMVAEConfig
    state: dict[str, Tensor]
    frozen: dict[str, dict[str, Any]]

    def load_into(self, model: nn.Module, parts: Mapping[str, Any]) -> None:
        """Copy the trained tensors into the model that ``wanted`` describes, and look whether its frozen parts are the saved
        model's. What did not train when the model was saved and is to train now keeps its own weights.

        Raises CheckpointError where tensors are missing, unknown or misshapen, or a frozen part is another one.
        """
        self._check_frozen(parts)
        parameters = dict(model.named_parameters())
        trains = {name for name, value in parameters.items() if value.requires_grad}
        fields = {
            "encoder.": ("train_encoder",),
            "decoder.": ("train_decoder", "decoder_part", "lora_rank", "lora_alpha"),
        }
        changed = tuple(
            part
            for part, names in fields.items()
            if any(getattr(self.config, name) != getattr(self.wanted, name) for name in names)
        )
        state = self.state
        if "decoder." in changed:  # adapters may stand beside what was saved without, and the other way round
            placed = {name.replace(".base_layer.", "."): name for name in parameters}
            state = {placed.get(name, name): value for name, value in state.items()}
            if self.config.train_decoder and self.config.decoder_part == "lora":
                scale = self.config.lora_alpha / self.config.lora_rank
                state |= into_weights(model, state, parameters, placed, scale)
                state = {name: value for name, value in state.items() if ".lora_" not in name}
        new = {name for name in trains - state.keys() if name.startswith(changed or ("\0",))}
        known = {name for name in state if name in parameters}
        copy_into({name: parameters[name] for name in (trains - new) | known}, state)
        for name, part in parts.items():
            now_frozen = {key for key in known - trains if key.startswith(f"{name}.")}
            frozen_parts.became_another(part, {key.removeprefix(f"{name}.") for key in now_frozen})

    def _check_frozen(self, parts: Mapping[str, Any]) -> None:
        for name, saved in self.frozen.items():
            if name in parts:
                frozen_parts.check(saved, name, parts[name], self.config, self.wanted, self.state)


def read_model(source: str | os.PathLike[str], **overrides: Any) -> StoredModel:
    """What a folder that :func:`save_model` wrote, or a Hugging Face hub name, holds.

    overrides: configuration fields to change (``decoder="/another/place"``, ``dtype="bfloat16"``, ``train_decoder=True``).

    Raises:
        CheckpointError: nothing there, truncated, corrupt (its sha256 is not the recorded one), or of another kind.
        ConfigError: an override is unknown or contradicts the rest.
    """
    folder = Path(source)
    recover_folder(folder)
    if not folder.is_dir():
        folder = download(str(source))
    values = read_object(folder / CONFIG, error=CheckpointError)
    if values.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{folder} is no lmvae_fast model",
            limit=f"format {FORMAT!r} in {CONFIG}",
            remedy="for a LangVAE checkpoint use lmvae_fast.integrations.langvae.load_checkpoint",
        )
    digest, frozen = values.pop("weights_sha256", None), values.pop(_FROZEN, {})
    for name in ("model_type", _FILES):
        values.pop(name, None)
    _check_frozen_entries(frozen, folder / CONFIG)
    try:
        config = LMVAEConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} does not fit this version: {error}") from error
    parts = {name: getattr(config, name) for name in ("encoder", "decoder")}
    config = config.replace(**{n: str((folder / part).resolve()) for n, part in parts.items() if part.startswith("./")})
    return StoredModel(
        config, config.replace(**_of_stage(config, overrides)), _read_weights(folder / WEIGHTS, digest), frozen
    )


def _of_stage(config: LMVAEConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides with what one of these two fields says of the other: a part that is named is to train, and of a frozen decoder
    no part does."""
    if overrides.get("decoder_part") is not None and config.stage is None:
        return {"train_decoder": True, **overrides}
    return {"decoder_part": "all", **overrides} if overrides.get("train_decoder") is False else overrides


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a state into parameters of the same names and shapes; CheckpointError, before any is changed, otherwise."""
    missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(
            "the weights belong to another model",
            value=f"missing {missing[:4]}, unknown {unknown[:4]}",
            remedy="load them into a model of the configuration they were saved with",
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise CheckpointError(
                f"weight {name} has another shape",
                value=list(state[name].shape),
                limit=list(parameter.shape),
                remedy="load it into a model of the configuration it was saved with",
            )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def _stored(part: Any, include_frozen: bool | None) -> bool:
    return part.source is None or Path(part.source).exists() if include_frozen is None else include_frozen


def _replaced(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of parts that were copied in from elsewhere, by their names in a model."""
    return {
        f"{name}.{key}": value.detach()
        for name, part in parts.items()
        for key, value in part.named_parameters()
        if key.replace(".base_layer.", ".") in frozen_parts.replaced(part)
    }


def _store_part(part: Any, folder: Path) -> None:
    """Encoder or decoder with its tokenizer as an ordinary Hugging Face folder."""
    sharded = any(map(in_pieces, part.model.parameters()))
    if sharded or getattr(part.model, "is_quantized", False):
        # No process has all of it, or transformers cannot write again what it has read; but what it was loaded from and what
        # trains, which is stored anyway, are all it is.
        if part.source is None or not Path(part.source).is_dir():
            raise OutputError(
                f"a {'sharded' if sharded else 'quantised'} decoder that came from no folder cannot be stored",
                value=f"source={part.source}",
                remedy="save with include_frozen=False, or load the decoder from a folder",
            )
        shutil.copytree(part.source, folder)
        return
    part.model.save_pretrained(folder, state_dict=without_adapters(part.model.state_dict()))
    tokenizer = part.tokenizer.tokenizer if isinstance(part.tokenizer, SentenceTokenizer) else part.tokenizer
    without_state(tokenizer).save_pretrained(folder)
    if hasattr(part, "write_modules"):
        part.write_modules(folder)


def _read_weights(path: Path, digest: str | None) -> dict[str, Tensor]:
    check_floating(read_headers(path), path)
    state = read_tensors(path)
    if digest is not None and sha256_file(path) != digest:
        raise CheckpointError(
            f"{path} is corrupt: its sha256 is not the one in {CONFIG}",
            limit=digest,
            remedy="restore it from a copy; after a change on purpose, remove weights_sha256 from the configuration",
        )
    check_finite(state, path)
    return state


def _check_frozen_entries(frozen: Any, path: Path) -> None:
    entries = list(frozen.values()) if isinstance(frozen, dict) else [None]
    if not all(
        isinstance(e, dict) and all(isinstance(e.get(name), str) for name in ("dtype", "sha256")) for e in entries
    ):
        raise CheckpointError(
            f"{path}: {_FROZEN} is no record of fingerprints", value=frozen, limit='{"decoder": {"dtype": .., "sha256": ..}}',
            remedy="restore it from a copy",
        )  # fmt: skip


def download(name: str, **options: Any) -> Path:
    """The folder of a model on the Hugging Face hub; options of ``snapshot_download`` (revision, token, cache_dir ...).

    Raises CheckpointError where it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, **options))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"no model at {name!r}: neither a folder nor to be had from the hub ({type(error).__name__})",
            remedy="check the path or name, and the network",
        ) from error


def holds_model(folder: Path) -> bool:
    """Whether a folder's configuration is that of a model of ours."""
    try:
        return read_object(folder / CONFIG, error=CheckpointError).get("format") == FORMAT
    except CheckpointError:
        return False
