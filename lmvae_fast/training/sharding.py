"""A decoder held in pieces: FSDP2 over its layers, for decoders that do not fit one device.

Each rank keeps its part of every layer's weights and fetches a layer whole when it runs, in forward and again in backward.
Layers that train keep gradients and AdamW's moments in pieces too. Embeddings, the last norm and the head stay whole,
because the head's loss reads its weight outside of any module; so do adapters, which are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError, UnsupportedDecoderError
from lmvae_fast.models.adapter import AdapterProjector
from lmvae_fast.training.distributed import Ranks
from lmvae_fast.training.step_setup import castable


def check_shardable(model: Any, config: TrainConfig, ranks: Ranks) -> None:
    """Raises ConfigError where sharding the decoder of ``model`` makes no sense or would leave ranks waiting for ever."""
    problem = None
    if ranks.alone:
        problem, remedy = "a decoder is sharded over processes", "start with torchrun --nproc-per-node N"
    elif model.config.free_running:
        # ranks would decode different numbers of tokens, and each token needs all of them
        problem, remedy = (
            "ranks that share a decoder must take equal steps",
            "set free_running=False, or leave shard off",
        )
    elif config.precision == "fp16" and model.decoder.trains:
        # whether a step is skipped would be decided for the pieces and for what is whole apart
        problem, remedy = "a gradient scaler must see all gradients of a step together", "use precision='bf16'"
    elif isinstance(model.projector, AdapterProjector) and model.projector.own is None:
        # the adapter reads the layers' weights outside of the layers' own pass
        problem, remedy = "an adapter shares projections that sharding would hold in pieces", "use stage 0 or 1"
    if problem is not None:
        raise ConfigError(problem, value=f"shard=True in {ranks.world} process(es)", remedy=remedy)


def shard_decoder(decoder: nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Shard the layers of a Decoder over all ranks, for good: from then on all ranks run it together.

    dtype: hold what is frozen of the layers in it (None: as it is). Gradients of layers that train are sums over the ranks.
    Raises UnsupportedDecoderError for a decoder without a list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, and seldom needed
    from torch.distributed.fsdp import fully_shard

    layers = _layers(decoder)
    mesh = init_device_mesh(next(decoder.parameters()).device.type, (ranks.world,))
    halved = {id(parameter) for parameter in castable(decoder)}
    for layer in layers:
        for parameter in layer.parameters() if dtype is not None else ():
            if id(parameter) in halved:
                parameter.data = parameter.data.to(dtype)
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        adapters = trained if len(trained) < len(list(layer.parameters())) else set()
        sharded = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
        # Our losses are weighted so that gradients add up; a plain sum, because gloo knows no other.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which all ranks have, the pieces that are held of ``like``."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    count = decoder.num_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedDecoderError(
        "the decoder's layers are not in one list, so they cannot be sharded",
        limit=f"a ModuleList of {count}",
        remedy="leave shard off",
    )
