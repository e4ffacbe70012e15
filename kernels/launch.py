"""How Triton kernels are launched: on the tensor's device, with explicit floating-point fusion, compile cases declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Said explicitly at every launch and in the compile gate: Triton changes the default between versions.
FP_FUSION = True

#: Programs that CUDA launches at most along each axis of a grid.
MAX_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class Config:
    """Sizes of one shipped configuration: constexpr arguments and launch options.

    max_registers: per thread. The assembler spills a value or two where that brings one more block to a multiprocessor; a
    bound above what the kernel needs forbids the trade. dependent: the kernel may begin while the one before it on the
    stream ends (programmatic dependent launch, sm_90 on) and waits for it by `gdc_wait`.
    """

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    dependent: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launch and compilation take beside the arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        dependent = {"launch_pdl": True} if self.dependent else {}
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION, **limit, **dependent,
        }  # fmt: skip


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one shipped configuration, for the compile gate.

    name: unique within the op, e.g. "fwd-bf16-128". kernel: the @triton.jit function. signature: Triton types of the
    run-time arguments in any order, e.g. {"x": "*bf16", "rows": "i32", "scale": "fp32", "stride_d": 1}; an int is a value
    that Triton makes a constant of (it does so for 1). constants: the constexpr arguments beside those of `config`.
    unaligned: pointers that are not 16-byte aligned. only_aligned: it is launched with sizes and strides that are multiples
    of 16 alone. multiples: integers that are multiples of 16 whatever the call. tensor_cores: a matrix instruction (mma or
    wgmma) must appear in the machine code; warpgroup: on sm_90 it must be wgmma. wide_loads: on sm_90, with sizes and strides
    that are multiples of 16 or given as such, most bytes must come by 16-byte loads. max_shared: bytes of shared memory the
    kernel may use (an sm_80 block has 163 KiB, an sm_90 or sm_100 block 227 KiB). max_registers: per thread, with sizes and
    strides that are multiples of 16 on sm_90; what it buys is blocks that run side by side on a multiprocessor. Where the
    configuration is `dependent`, it is compiled for the cards that know such launches alone.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | int]
    config: Config
    constants: Mapping[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    only_aligned: bool = False
    multiples: tuple[str, ...] = ()
    tensor_cores: bool = False
    warpgroup: bool = False
    wide_loads: bool = False
    max_shared: int = 163 * 1024
    max_registers: int = 255


TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, config: Config, *args: Any, **constants: Any
) -> None:
    """Launch `kernel` on `device` (Triton itself takes the current one). Grids with a zero are no work and no launch.

    Raises ValueError for a grid that CUDA does not launch.
    """
    if 0 in grid:
        return
    if any(size > most for size, most in zip(grid, MAX_GRID, strict=False)):
        raise ValueError(
            f"{kernel.__name__} needs a grid of {grid} programs, CUDA launches at most {MAX_GRID}: split the batch"
        )
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **config.constants, **constants, **config.options)
    else:
        kernel[grid](*args, **config.constants, **constants, **config.options)
