"""Latents in files: safetensors, npy, pt, csv or jsonl, read block by block and checked."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmvae_fast.data.lines import check_inflated, decoded_lines, open_file
from lmvae_fast.documents import check_regular, parse_json
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.files import fsync_file, replacing, write_tensors
from lmvae_fast.tensor_files import read_headers

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


def width_of(path: str | os.PathLike[str], *, name: str = "z") -> int:
    """Numbers of a row of a file that :func:`read_latents` reads. Raises what that raises."""
    path = _checked(path)
    if path.suffix != ".jsonl":
        shape = _open_array(path, name)[1]
        if len(shape) != 2:
            raise LatentError(f"{path} holds no rows of numbers", value=list(shape), limit="[N, width]")
        return shape[1]
    row = next(_jsonl_rows(path, name), None)
    if row is None:
        raise DataError(f"{path} holds no rows", remedy="check what wrote it")
    return len(row[1])


def _checked(path: str | os.PathLike[str]) -> Path:
    path = check_regular(path, what="file of latents")
    if path.suffix not in FORMATS:
        raise DataError("unknown format of a file of latents", value=path.suffix or path.name, limit=", ".join(FORMATS))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", value="0 bytes", remedy="check what wrote it")
    return path


def _open_array(path: Path, name: str) -> tuple[Callable[[int, int], Tensor], tuple[int, ...]]:
    """(function (start, stop) -> rows, shape) of a file that is no jsonl."""
    if path.suffix == ".npy":
        array = read_npy(path)
        if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
            raise DataError(f"{path} holds no real numbers", value=array.dtype, limit="floats or integers of 64 bits")
        return lambda start, stop: torch.from_numpy(np.array(array[start:stop])), array.shape
    if path.suffix in (".pt", ".csv"):
        whole = _read_pt(path, name) if path.suffix == ".pt" else _read_csv(path)
        return lambda start, stop: whole[start:stop], tuple(whole.shape)
    headers = read_headers(path, error=DataError)
    if name not in headers and len(headers) != 1:
        raise DataError(
            f"{path} holds several tensors and none is named {name}", value=", ".join(list(headers)[:5]),
            remedy=f"name it {name}",
        )  # fmt: skip
    stored = name if name in headers else next(iter(headers))
    if headers[stored].dtype == "BOOL" or headers[stored].dtype.startswith("C"):
        raise DataError(f"{path} holds no real numbers", value=headers[stored].dtype, limit="floats or integers")

    def read(start: int, stop: int) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                return file.get_slice(stored)[start:stop]
        except (SafetensorError, OSError) as error:  # changed since its header was read
            raise DataError(f"{path} is truncated or corrupt: {error}", remedy="write it again") from error

    return read, headers[stored].shape


def read_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, memory-mapped. Raises DataError for a damaged file, one of another kind under that name,
    objects, and numbers of another byte order."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header fails in many ways
        raise DataError(f"{path} is truncated or corrupt, or no .npy: {error}", remedy="write it again") from error
    if not array.dtype.isnative:
        raise DataError(
            f"{path} is of another machine's byte order", value=array.dtype, limit=array.dtype.newbyteorder("="),
            remedy="write it again with array.astype(array.dtype.newbyteorder('='))",
        )  # fmt: skip
    return array


def _read_pt(path: Path, name: str) -> Tensor:
    """The tensor of a file that torch.save wrote; unpickles tensors and containers of them only."""
    check_inflated(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated kinds, which are refused below
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path} is no file of tensors: {reason}", remedy="save it as safetensors") from error
    if isinstance(value, dict):
        value = value.get(name, next(iter(value.values())) if len(value) == 1 else None)
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.is_complex()
        or value.dtype == torch.bool
        or value.device.type != "cpu"
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()
    ):
        raise DataError(
            f"{path} holds no plain tensor",
            value=f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__,
            limit=f"a dense real tensor, or one named {name}",
            remedy="save it dequantised, dense and real, as safetensors",
        )
    return value.detach()


def _read_csv(path: Path) -> Tensor:
    """Rows of numbers, commas between them; a first row without a single number names the columns.

    One of 0, 1, 2 .. is refused: it is what pandas names columns without names, unless it is a latent after all.
    """
    with open_file(path) as file:
        first = next((text for _, text in decoded_lines(file, path)), "")
    named = first.replace('"', "").split(",")
    if [cell.strip() for cell in named] == [str(place) for place in range(len(named))]:
        raise DataError(
            f"{path} line 1 may be the numbers of the columns or a latent", value=first[:60],
            remedy="write the table without its header (DataFrame.to_csv(path, header=False, index=False)); for a latent write "
            "its numbers as 0.0, 1.0 ..",
        )  # fmt: skip
    cells = [_as_number(cell) for cell in first.split(",")]
    if any(cell is None for cell in cells) and any(cell is not None for cell in cells):
        raise DataError(f"{path} line 1 is neither numbers nor a header", value=first[:60], remedy="mend that line")
    header = int(cells[0] is None)
    try:
        rows = np.loadtxt(
            path, delimiter=",", skiprows=header, ndmin=2, dtype=np.float32, encoding="utf-8-sig", comments=None
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is truncated or corrupt: {error}", remedy="write it again") from error
    return torch.from_numpy(rows)


def _as_number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[int, list[float]]]:
    """Number and row of each line that is not empty."""
    form = f'{{"{name}": [numbers]}}'
    with open_file(path) as file:
        for number, line in decoded_lines(file, path):
            if not line.strip():
                continue
            values = parse_json(line, f"{path} line {number} is no row", remedy="mend that line", limit_text=form)
            values = values.get(name) if isinstance(values, dict) else values
            # True and "1.5" would become numbers, a mapping's keys too: none of them was written as a latent
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                raise DataError(
                    f"{path} line {number} is no row", value=line[:60].strip(), limit=form, remedy="mend that line"
                )
            yield number, [float(value) for value in values]


def _read_jsonl(path: Path, latent_dim: int, block: int, skip: int, name: str) -> Iterator[Tensor]:
    rows: list[list[float]] = []
    seen = 0
    for number, row in _jsonl_rows(path, name):
        seen += 1
        if seen <= skip:
            continue
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
