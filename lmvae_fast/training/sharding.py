"""A frozen decoder held in pieces: FSDP2 over its layers, for decoders that do not fit one device.

Each rank keeps its part of every layer's weights and fetches a layer whole when it runs, in forward and again in backward.
Embeddings, the last norm and the head stay whole, because the head's loss reads its weight outside of any module. What
trains is not sharded (beside a frozen decoder it is small), so checkpoints are those of any run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.training.distributed import Ranks


def check_shardable(model: Any, ranks: Ranks) -> None:
    """Raises ConfigError where sharding the decoder of ``model`` makes no sense or would leave ranks waiting for ever."""
    problem = None
    if ranks.alone:
        problem, remedy = "a decoder is sharded over processes", "start with torchrun --nproc-per-node N"
    elif model.decoder.trains:
        problem, remedy = "only a frozen decoder is sharded", "freeze the decoder, or leave shard off"
    elif model.config.free_running:
        # ranks would decode different numbers of tokens, and each token needs all of them
        problem, remedy = "ranks that share a decoder must take equal steps", "set free_running=False, or leave shard off"
    if problem is not None:
        raise ConfigError(problem, value=f"shard=True in {ranks.world} process(es)", remedy=remedy)


def shard_decoder(decoder: nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Shard the layers of a frozen Decoder over all ranks, for good: from then on all ranks run it together.

    dtype: hold the layers in it (None: as they are). Raises UnsupportedDecoderError for a decoder without a list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, and seldom needed
    from torch.distributed.fsdp import fully_shard

    layers = _layers(decoder)
    mesh = init_device_mesh(next(decoder.parameters()).device.type, (ranks.world,))
    for layer in layers:
        if dtype is not None:
            layer.to(dtype)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    count = decoder.num_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedDecoderError(
        "the decoder's layers are not in one list, so they cannot be sharded", limit=f"a ModuleList of {count}",
        remedy="leave shard off",
    )  # fmt: skip
