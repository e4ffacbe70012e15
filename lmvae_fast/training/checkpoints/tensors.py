"""What a checkpoint holds besides the weights, as tensors and JSON: optimizer and random states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmvae_fast.errors import CheckpointError
from lmvae_fast.files import sampled_fingerprint


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that requires a gradient, in the model's order (shared ones once)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_fingerprint(model: nn.Module, samples: int = 256) -> str:
    """sha256 over names, shapes and evenly spaced values of what does not train.

    A checkpoint holds none of it, so this is how a resumed run knows that it stands on the same frozen parts. Sampled,
    because hashing the whole of a large decoder takes longer than many a run's first epoch.
    """
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    return sampled_fingerprint(frozen, samples)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state, flattened to "<parameter name>/<key>" -> tensor."""
    flat = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], flat: Mapping[str, Tensor]
) -> None:
    """Put a flattened state back; each tensor goes to the device torch keeps it on (`step` stays where AdamW wants it).

    Raises CheckpointError if the state is of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(names)}
    for path, value in flat.items():
        name, _, key = path.rpartition("/")
        if name not in index:
            raise CheckpointError(
                "the checkpoint's optimizer state names a parameter that this model does not train",
                value=name,
                remedy="resume with the configuration the run was started with",
            )
        if key != "step" and value.shape != names[name].shape:
            raise CheckpointError(
                f"the checkpoint's optimizer state of {name} has another shape",
                value=tuple(value.shape),
                limit=tuple(names[name].shape),
                remedy="resume with the configuration the run was started with",
            )
        # A copy: what was read from a file may be memory-mapped, and the optimizer updates it in place.
        state.setdefault(index[name], {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    # load_state_dict casts and moves as this optimizer's implementation (fused, foreach) needs it.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def seed_all(seed: int) -> None:
    """Seed torch's, numpy's and Python's global generators, so that a run depends on nothing drawn before it."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_tensors(device: torch.device | None = None) -> dict[str, Tensor]:
    """The states of torch's CPU generator, of the device's if it is a GPU, of numpy's global one and of Python's."""
    states = {"torch": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    states["python"] = torch.tensor([version, *words], dtype=torch.int64)
    states["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    legacy: Any = np.random.get_state(legacy=False)
    if legacy["bit_generator"] == "MT19937":
        words = [*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]
        states["numpy"] = torch.tensor(words, dtype=torch.int64)
        states["numpy.gauss"] = torch.tensor([legacy["gauss"]], dtype=torch.float64)
    return states


def restore_random(states: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Put the states of `random_tensors` back. Raises CheckpointError if they do not fit the generators."""
    try:
        torch.set_rng_state(states["torch"])
        if device is not None and device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        version, *words = states["python"].tolist()
        gauss = states["python.gauss"].tolist()
        random.setstate((version, tuple(words), gauss[0] if gauss else None))
        if "numpy" in states:
            *key, position, has_gauss = states["numpy"].tolist()
            np.random.set_state(
                ("MT19937", np.array(key, np.uint32), position, has_gauss, states["numpy.gauss"].item())
            )
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint's random states cannot be used here: {error}",
            remedy="resume with the torch and Python versions the run was started with",
        ) from error
