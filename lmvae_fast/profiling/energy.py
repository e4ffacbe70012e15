"""Energy of a GPU through NVML, where the optional package ``pynvml`` (nvidia-ml-py) and a GPU that counts it are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def joules_per_call(
    function: Callable[[], Any], device: torch.device, seconds: float = 2.0
) -> tuple[float | None, str]:
    """Joules of a call and "", from the GPU's own counter over about ``seconds`` of calls; or None and the reason why not."""
    if device.type != "cuda":
        return None, "energy is counted on NVIDIA GPUs only"
    try:
        import pynvml
    except ImportError:
        return None, "pynvml is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        before, calls, spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0, 0.0
        while spent < seconds:
            start.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            spent += start.elapsed_time(end) / 1e3
            calls += 1
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / calls, ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
