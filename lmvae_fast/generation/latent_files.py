"""Latents in files: safetensors, npy, pt, csv or jsonl, read block by block and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.files import fsync_file, replacing, write_tensors

FORMATS = (".safetensors", ".npy", ".pt", ".csv", ".jsonl")
_WRITTEN = (".safetensors", ".npy", ".jsonl")


def check_latents(path: str | os.PathLike[str], *, latent_dim: int, name: str = "z") -> int:
    """Rows of a file that :func:`read_latents` reads, every one of them looked at before any is used.

    Raises what :func:`read_latents` raises, and LatentError for NaN or Inf, with the row.
    """
    rows = 0
    for block in read_latents(path, latent_dim=latent_dim, block=8192, name=name):
        bad = (~torch.isfinite(block)).any(1)
        if bool(bad.any()):
            row = rows + int(bad.nonzero()[0])
            raise LatentError(
                f"{path} contains NaN or Inf", value=f"row {row}, counted from 0", remedy="drop or mend that row"
            )
        rows += block.shape[0]
    return rows


def read_latents(
    path: str | os.PathLike[str], *, latent_dim: int, block: int = 1024, skip: int = 0, name: str = "z"
) -> Iterator[Tensor]:
    """Blocks of latents, float32 ``[n <= block, latent_dim]``, beginning at row ``skip``.

    ``.safetensors`` and ``.pt`` (nothing but tensors is unpickled): the tensor ``name``, or the only one; ``.npy``: an array
    (memory-mapped); ``.csv``: numbers, a row a latent, a header or none; ``.jsonl``: one ``{"<name>": [...]}`` or bare list
    per line.

    Raises:
        DataError: missing, empty or unreadable file (with the line number for jsonl).
        LatentError: rows of another width.
    """
    path = _checked(path)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, latent_dim, block, skip, name)
        return
    read, shape = _open_array(path, name)
    if len(shape) != 2 or shape[1] != latent_dim:
        raise LatentError(f"{path} holds rows of another width", value=list(shape), limit=f"[N, {latent_dim}]")
    if shape[0] == 0:
        raise DataError(f"{path} holds no rows", value=list(shape), remedy="check what wrote it")
    for start in range(skip, shape[0], block):
        yield read(start, min(start + block, shape[0])).float()


def write_latents(path: str | os.PathLike[str], latents: Tensor | Iterable[Tensor]) -> None:
    """Write latents ``[N, latent_dim]`` as ``.safetensors`` (tensor ``z``), ``.npy`` or ``.jsonl``, whole or not at all.

    Raises DataError for another ending, OutputError when the file cannot be written.
    """
    path = Path(path)
    z = (latents if isinstance(latents, Tensor) else torch.cat(list(latents))).detach().cpu().float().contiguous()
    if path.suffix not in _WRITTEN:
        raise DataError("unknown latent file format", value=path.suffix, limit=", ".join(_WRITTEN))
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            write_tensors(temporary, {"z": z})
        elif path.suffix == ".npy":
            with temporary.open("wb") as file:  # np.save puts .npy behind a name that lacks it
                np.save(file, z.numpy())
        else:
            temporary.write_text("".join(json.dumps({"z": row}) + "\n" for row in z.tolist()))
        fsync_file(temporary)


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file of latents at {path}", remedy="check the path")
    if path.suffix not in FORMATS:
        raise DataError("unknown format of a file of latents", value=path.suffix or path.name, limit=", ".join(FORMATS))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", value="0 bytes", remedy="check what wrote it")
    return path


def _open_array(path: Path, name: str):
    """(function (start, stop) -> rows, shape) of a safetensors or npy file."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype.kind not in "fiu":
                raise DataError(f"{path} holds no real numbers", value=array.dtype, limit="floats or integers")
            return lambda start, stop: torch.from_numpy(np.array(array[start:stop])), array.shape
        if path.suffix in (".pt", ".csv"):
            whole = _read_pt(path, name) if path.suffix == ".pt" else _read_csv(path)
            return lambda start, stop: whole[start:stop], tuple(whole.shape)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if name not in names and len(names) != 1:
                raise DataError(
                    f"{path} holds several tensors and none is named {name}",
                    value=", ".join(names[:5]),
                    remedy=f"name it {name}",
                )
            stored = name if name in names else names[0]
            shape = tuple(file.get_slice(stored).get_shape())

        def read(start: int, stop: int) -> Tensor:
            with safe_open(path, "pt") as file:
                return file.get_slice(stored)[start:stop]

        return read, shape
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is truncated or corrupt: {error}", remedy="write it again") from error


def _read_pt(path: Path, name: str) -> Tensor:
    """The tensor of a file that torch.save wrote; unpickles tensors and containers of them only."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have errors of many kinds
        raise DataError(
            f"{path} is no file of tensors: {str(error).strip().splitlines()[0][:200]}", remedy="save it as safetensors"
        ) from error
    if isinstance(value, dict):
        value = value.get(name, next(iter(value.values())) if len(value) == 1 else None)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise DataError(
            f"{path} holds no plain tensor",
            value=type(value).__name__,
            limit=f"a dense real tensor, or one named {name}",
        )
    return value.detach()


def _read_csv(path: Path) -> Tensor:
    """Rows of numbers, commas between them."""
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    try:
        list(map(float, first.split(",")))
        header = 0
    except ValueError:
        header = 1
    return torch.from_numpy(
        np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2, dtype=np.float32, encoding="utf-8")
    )


def _read_jsonl(path: Path, latent_dim: int, block: int, skip: int, name: str) -> Iterator[Tensor]:
    rows: list[list[float]] = []
    seen = 0
    with path.open(encoding="utf-8", errors="replace") as file:  # a byte that is no UTF-8 makes its line no JSON
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            seen += 1
            if seen <= skip:
                continue
            try:
                values = json.loads(line)
                values = values[name] if isinstance(values, dict) else values
                row = [float(value) for value in values]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path} line {number} is no row: {error}",
                    value=line[:60].strip(),
                    limit=f'{{"{name}": [numbers]}}',
                    remedy="mend that line",
                ) from error
            if len(row) != latent_dim:
                raise LatentError(f"{path} line {number}", value=f"{len(row)} numbers", limit=latent_dim)
            rows.append(row)
            if len(rows) == block:
                yield torch.tensor(rows, dtype=torch.float32)
                rows = []
    if rows:
        yield torch.tensor(rows, dtype=torch.float32)
    if not seen:
        raise DataError(f"{path} holds no rows", remedy="check what wrote it")
