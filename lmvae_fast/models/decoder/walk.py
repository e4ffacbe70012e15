"""A model's modules and parameters without their names, which `nn.Module.named_parameters` puts together at every call, here in
every training step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

ADAPTER = "lora_"  # how names of what peft puts beside a weight begin


def modules_of(model: nn.Module, *, adapters: bool = True) -> Iterator[nn.Module]:
    """All modules, each once, in the order of ``model.modules()``; without those of low-rank adapters unless ``adapters``."""
    seen: set[int] = set()
    below = [model]
    while below:
        module = below.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        for name, child in reversed(module._modules.items()):
            if child is not None and (adapters or not name.startswith(ADAPTER)):
                below.append(child)


def parameters_of(model: nn.Module, *, adapters: bool = True) -> list[nn.Parameter]:
    """All parameters, each once, in the order of ``model.parameters()``; as `modules_of`."""
    found = {
        id(parameter): parameter
        for module in modules_of(model, adapters=adapters)
        for name, parameter in module._parameters.items()
        if parameter is not None and (adapters or not name.startswith(ADAPTER))
    }
    return list(found.values())
