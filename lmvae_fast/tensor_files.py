"""Files of tensors from elsewhere: their headers are looked at before their bodies, and their values before they are used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmvae_fast.documents import check_regular
from lmvae_fast.errors import CheckpointError, LMVAEError, OutputError

#: What safetensors calls the dtypes that weights may have.
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
_AGAIN = "restore it from a copy"


class Header(NamedTuple):
    """What a file says of a tensor in it: dtype as safetensors names it (``F32``, ``I64``, ...), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def check_readable_again(path: str | os.PathLike[str]) -> None:
    """OutputError for a path that safetensors writes to but cannot read from: one that is not valid UTF-8."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise OutputError(
            "tensors written there could not be read again: the path is not valid UTF-8", value=ascii(os.fspath(path)),
            remedy="choose another output",
        ) from None  # fmt: skip


def read_headers(path: str | os.PathLike[str], *, error: type[LMVAEError] = CheckpointError) -> dict[str, Header]:
    """Name -> header of every tensor of a safetensors file; no tensor is read.

    Raises ``error`` for a file that is missing, no ordinary one, truncated or corrupt.
    """
    path = check_regular(path, error=error)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return {name: Header(str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as problem:
        raise error(f"{path} is missing, truncated or corrupt: {problem}", remedy=_AGAIN) from problem


def read_tensors(path: str | os.PathLike[str], *, error: type[LMVAEError] = CheckpointError) -> dict[str, Tensor]:
    """The tensors of a safetensors file (memory-mapped). Raises what :func:`read_headers` raises."""
    path = check_regular(path, error=error)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (OSError, SafetensorError) as problem:
        raise error(f"{path} is missing, truncated or corrupt: {problem}", remedy=_AGAIN) from problem


def check_floating(
    headers: Mapping[str, Header], path: str | os.PathLike[str], *, error: type[LMVAEError] = CheckpointError
) -> None:
    """Raises ``error`` for weights that are integers, truth values or complex numbers: cast, they would be other weights."""
    for name, header in headers.items():
        if header.dtype not in FLOATING:
            raise error(
                f"{path}: weight {name} is of no floating dtype", value=header.dtype, limit=", ".join(sorted(FLOATING)),
                remedy="save it as it was trained; a quantised model must be dequantised first",
            )  # fmt: skip


def check_finite(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, error: type[LMVAEError] = CheckpointError
) -> None:
    """Raises ``error`` for the first floating tensor with NaN or Inf, which would make every text empty."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise error(
                f"{path}: weight {name} holds NaN or Inf", value=f"{count} of {tensor.numel()} numbers",
                remedy="take an earlier checkpoint, or restore it from a copy",
            )  # fmt: skip


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf; one pass, and no memory beside it."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.device.type == "meta":
        return True
    if hasattr(tensor, "qdata"):
        tensor = tensor.dequantize()  # torchao's, of which few operations are defined
    low, high = torch.aminmax(tensor.detach())  # NaN goes through both
    return math.isfinite(float(low)) and math.isfinite(float(high))


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], headers: Mapping[str, Header], *, error: type[LMVAEError] = CheckpointError
) -> None:
    """Raises ``error`` where a tensor that both name has another shape; nothing has been allocated then."""
    for name, shape in wanted.items():
        if name in headers and headers[name].shape != tuple(shape):
            raise error(
                f"weight {name} has another shape than the configuration says", value=list(headers[name].shape),
                limit=list(shape), remedy="restore configuration and weights from one copy",
            )  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a Hugging Face model folder."""
    kinds = ("*.safetensors", "pytorch_model*.bin")
    found = [sorted(folder.glob(kind)) for kind in kinds]
    return next((files for files in found if files), [])
