"""Whether what lies on a disk is what it says: models, flows, runs, checkpoints, files of latents and of texts.

Hashes, shapes, finite numbers and completeness are looked at; nothing is changed and nothing is run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmvae_fast.documents import check_regular, read_object
from lmvae_fast.errors import CheckpointError, DataError, LMVAEError
from lmvae_fast.files import made_as, recover_folder
from lmvae_fast.generation import latent_files
from lmvae_fast.generation.text_files import BlockHashes, meta_path
from lmvae_fast.models import flow_files, serialization
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.tensor_files import check_finite, read_headers
from lmvae_fast.training.callbacks import read_records
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints.run_state import check_state
from lmvae_fast.training.run_checks import RUN

KINDS = ("model", "flow", "LangVAE checkpoint", "run", "checkpoint", "latents", "texts")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is as it should be, and what was found."""

    name: str
    good: bool
    found: str


@dataclass
class Verification:
    """What was found at a path; ``kind`` is one of KINDS."""

    path: str
    kind: str
    checks: list[Check] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything is as it should be."""
        return all(check.good for check in self.checks)

    def look(self, name: str, at: Callable[[], Any]) -> Any:
        """Note whether ``at()``, which says what it found or a tuple of that and a value, raises; its value, or None."""
        try:
            found = at()
        except LMVAEError as error:
            self.checks.append(Check(name, False, str(error)))
            return None
        found, value = found if isinstance(found, tuple) else (found, None)
        self.checks.append(Check(name, True, str(found)))
        return value

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"path": self.path, "kind": self.kind, "good": self.good, "checks": [asdict(c) for c in self.checks]}


def verify(path: str | os.PathLike[str], *, latent_dim: int | None = None) -> Verification:
    """Look at a folder or a file that this package (or, for latents and LangVAE checkpoints, another) wrote.

    Args:
        path: a model folder, a flow, a training run, one of its checkpoints, a LangVAE checkpoint, a file of latents, or a
            file of texts that ``generate`` wrote.
        latent_dim: width that latents must have; default: any.

    Raises DataError for a path that is nothing of these.
    """
    path = Path(path)
    if path.is_dir():
        recover_folder(path)
        return _folder(path)
    check_regular(path, what="file or folder")
    if meta_path(path).is_file():
        return _texts(path)
    if path.suffix in latent_files.FORMATS:
        return _latents(path, latent_dim)
    raise DataError(f"{path} is nothing that can be verified", limit=", ".join(KINDS), remedy="name one of these")


def _folder(path: Path) -> Verification:
    if (path / checkpoint.MARKER).is_file() or checkpoint.is_name(path.name):
        return _checkpoint(path)
    if (path / "decoder_cfg.json").is_file():
        return _langvae(path)
    if (path / "checkpoints").is_dir() or made_as(path) == RUN:
        return _run(path)
    if (path / serialization.CONFIG).is_file():
        values = read_object(path / serialization.CONFIG, error=CheckpointError)
        return _flow(path) if values.get("format") in flow_files.FORMATS else _model(path)
    if (path / "model" / serialization.CONFIG).is_file():  # of a demonstration
        return _model(path / "model")
    raise DataError(f"{path} is nothing that can be verified", limit=", ".join(KINDS), remedy="name one of these")


def _model(path: Path) -> Verification:
    found = Verification(str(path), "model")
    stored = found.look("configuration and hash of the weights", lambda: _read_model(path))
    if stored is not None:
        found.look("finite weights", lambda: _all_finite(stored.state, path / serialization.WEIGHTS))
        found.look("parts, shapes and their finite weights", lambda: _loaded(path))
    return found


def _read_model(path: Path) -> tuple[str, Any]:
    stored = serialization.read_model(path)
    count = sum(tensor.numel() for tensor in stored.state.values())
    return f"{stored.config.system}, latent_dim {stored.config.latent_dim}, {count:,} trained numbers", stored


def _all_finite(tensors: Any, path: Path) -> str:
    check_finite(tensors, path)
    return f"{len(tensors)} tensors"


def _loaded(path: Path) -> str:
    model = LMVAE.from_pretrained(path)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def _flow(path: Path) -> Verification:
    found = Verification(str(path), "flow")
    tensors = found.look("configuration and hash of the numbers", lambda: _read_flow(path))
    if tensors is not None:
        found.look("finite numbers", lambda: _all_finite(tensors, path / flow_files.WEIGHTS))
    if (path / "vae").is_dir():
        found.checks += _model(path / "vae").checks
    return found


def _read_flow(path: Path) -> tuple[str, Any]:
    _, tensors = flow_files.read_folder(path)
    return f"{sum(tensor.numel() for tensor in tensors.values()):,} numbers", tensors


def _langvae(path: Path) -> Verification:
    found = Verification(str(path), "LangVAE checkpoint")

    def read() -> str:
        from lmvae_fast.integrations.langvae.files import read_folder

        contents = read_folder(path)
        return f"latent_dim {contents.latent_dim}, max_len {contents.max_len}"

    found.look("configurations, shapes and finite weights", read)
    return found


def _run(path: Path) -> Verification:
    found = Verification(str(path), "run")
    whole = checkpoint.complete(path / "checkpoints")
    found.look("checkpoints", lambda: _some(whole, path))
    for place in whole:
        found.checks += _checkpoint(place).checks
    records = path / "metrics.jsonl"
    if records.is_file():
        found.look("records", lambda: _records(records))
    for name, look in (("model", _model), ("flow", _flow)):
        if (path / name).is_dir():
            found.checks += look(path / name).checks
    return found


def _some(whole: list[Path], path: Path) -> str:
    if not whole:
        raise CheckpointError(f"{path} holds no complete checkpoint", remedy="start the run anew")
    return ", ".join(place.name for place in whole)


def _records(path: Path) -> str:
    lines = sum(1 for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip())
    records = read_records(path)
    if len(records) != lines:
        raise DataError(
            f"{path} is not whole", value=f"{len(records)} records in {lines} lines",
            remedy="a resumed run drops what is behind its checkpoint",
        )  # fmt: skip
    return f"{len(records)} records"


def _checkpoint(path: Path) -> Verification:
    found = Verification(str(path), "checkpoint")

    def read() -> str:
        loaded = checkpoint.load(path)
        check_state(loaded)
        for group, tensors in loaded.tensors.items():
            check_finite(tensors, path / f"{group}.safetensors")
        count = sum(tensor.numel() for tensors in loaded.tensors.values() for tensor in tensors.values())
        return f"step {loaded.state['progress']['step']}, {count:,} numbers, every file as its manifest says"

    found.look(f"{path.name}: hashes, state and finite numbers", read)
    return found


def _latents(path: Path, latent_dim: int | None) -> Verification:
    found = Verification(str(path), "latents")

    def read() -> str:
        width = latent_dim or latent_files.width_of(path)
        return f"{latent_files.check_latents(path, latent_dim=width):,} rows of {width} finite numbers"

    if path.suffix == ".safetensors":
        found.look("header", lambda: ", ".join(f"{n} {h.dtype} {list(h.shape)}" for n, h in read_headers(path).items()))
    found.look("rows", read)
    return found


def _texts(path: Path) -> Verification:
    found = Verification(str(path), "texts")
    meta = found.look("what made it", lambda: _meta(path))
    if meta is not None:
        total = meta["total"] * meta["generation"].get("num_samples", 1)
        size = meta["block_size"] * meta["generation"].get("num_samples", 1)
        found.look("blocks", lambda: _blocks(path, size, total))
    return found


def _meta(path: Path) -> tuple[str, dict[str, Any]]:
    meta = read_object(meta_path(path))
    numbers = [meta.get("total"), meta.get("block_size")]
    if not all(type(number) is int and number > 0 for number in numbers) or not isinstance(
        meta.get("generation"), dict
    ):
        raise DataError(
            f"{meta_path(path)} is another program's", value=shown_keys(meta), remedy="restore it from a copy"
        )
    return f"{meta['total']} latents ({meta.get('latents')})", meta


def shown_keys(values: dict[str, Any]) -> str:
    """Names of a mapping, for messages."""
    return ", ".join(map(str, list(values)[:8]))


def _blocks(path: Path, size: int, total: int) -> str:
    recorded = BlockHashes(path).recorded()
    lines, blocks, digest = 0, 0, hashlib.sha256()
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            lines += line.endswith(b"\n")
            if lines % size and lines != total:
                continue
            if recorded is not None and blocks < len(recorded) and digest.hexdigest() != recorded[blocks]:
                raise DataError(
                    f"block {blocks + 1} of {path} is not what was written", value=digest.hexdigest()[:16],
                    limit=recorded[blocks][:16], remedy="restore it from a copy, or overwrite the output",
                )  # fmt: skip
            blocks, digest = blocks + 1, hashlib.sha256()
    if lines != total or (recorded is not None and len(recorded) != blocks):
        raise DataError(
            f"{path} is not complete", value=f"{lines} lines", limit=f"{total} lines",
            remedy="the command that began it continues it",
        )  # fmt: skip
    return f"{lines} lines in {blocks} blocks, " + (
        "each with its hash" if recorded is not None else "none with a hash"
    )
