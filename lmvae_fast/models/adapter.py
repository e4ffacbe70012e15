"""From a latent to memory through the decoder's own eyes: states that the layer's key and value projections read.

The adapter of CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.key_value import KeyValueMaps, LayerKeyValue, Projection, keys_and_values


class OwnMaps(nn.Module):
    """Trainable copies of a decoder's key and value maps, all layers in one tensor each."""

    def __init__(self, maps: KeyValueMaps):
        super().__init__()
        layers = [maps.layer(layer) for layer in range(len(maps.modules))]
        self.key_weight = _stacked([layer.key.weight for layer in layers])
        self.value_weight = _stacked([layer.value.weight for layer in layers])
        self.key_bias = self.value_bias = None
        if layers[0].key.bias is not None:
            self.key_bias = _stacked([layer.key.bias for layer in layers])
        if layers[0].value.bias is not None:
            self.value_bias = _stacked([layer.value.bias for layer in layers])
        norms = [copy.deepcopy(layer.norm) for layer in layers if layer.norm is not None]
        self.norms = nn.ModuleList(norm.requires_grad_(True) for norm in norms).float()

    def layer(self, layer: int) -> LayerKeyValue:
        """The maps of one layer."""
        key_bias = None if self.key_bias is None else self.key_bias[layer]
        value_bias = None if self.value_bias is None else self.value_bias[layer]
        return LayerKeyValue(
            Projection(self.key_weight[layer], key_bias),
            Projection(self.value_weight[layer], value_bias),
            self.norms[layer] if len(self.norms) else None,
        )


class AdapterProjector(nn.Module):
    """Keys and values of P slots per layer: a small network of z, a norm, then that layer's own key and value projections.

    Keys stand at positions 0 .. P-1 where the decoder turns keys by position.

    Args:
        latent_dim: width of the input.
        decoder: whose projections are used.
        slots: P.
        middle: hidden width of each layer's network; the whole part of sqrt(hidden size) by default.
        own_projections: train copies of the projections (stages 0 and 1); otherwise they are the decoder's own, and frozen.
        norm: ``rms``, or ``layer`` (the method's older form on GPT-2).
        eps: of the norm.

    Raises:
        UnsupportedDecoderError: keys and values of this decoder are no plain projections that could be shared.
    """

    def __init__(
        self,
        latent_dim: int,
        decoder: Decoder,
        *,
        slots: int,
        middle: int | None = None,
        own_projections: bool = False,
        norm: str = "rms",
        eps: float = 1e-6,
    ):
        super().__init__()
        layers, hidden = decoder.num_layers, decoder.hidden_size
        middle = middle or math.isqrt(hidden)
        self.slots, self.kv_heads, self.norm, self.eps = slots, decoder.kv_heads, norm, eps
        self.down_weight, self.down_bias = _linears(layers, latent_dim, middle)
        self.up_weight, self.up_bias = _linears(layers, middle, slots * hidden)
        self.norm_weight = nn.Parameter(torch.ones(layers, 1, 1, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(layers, 1, 1, hidden)) if norm == "layer" else None
        maps = KeyValueMaps(decoder, slots)
        self.turns: Tensor | None
        self.register_buffer("turns", maps.turns, persistent=False)
        self.own = OwnMaps(maps) if own_projections else None
        self.shared = None if own_projections else maps  # no module: its parameters are the decoder's

    @torch.no_grad()
    def start_at(self, states: Tensor, scale: float) -> None:
        """Make the projections of every slot read ``states`` ``[layers, hidden]`` at the start, whatever z, and what z adds
        before the norm ``scale`` times as large as it was drawn."""
        states = states.to(self.up_bias)
        self.up_weight.mul_(scale)
        self.up_bias.view(len(states), self.slots, -1).copy_(states.unsqueeze(1))
        middle = states.mean(1) if self.norm_bias is not None else states.new_zeros(len(states))
        spread = ((states - middle[:, None]).square().mean(1) + self.eps).sqrt()  # the norm undone
        self.norm_weight.copy_(spread[:, None, None, None].expand_as(self.norm_weight))
        if self.norm_bias is not None:
            self.norm_bias.copy_(middle[:, None, None, None].expand_as(self.norm_bias))

    def states(self, z: Tensor) -> Tensor:
        """What the projections read, ``[layers, batch, slots, hidden]``, of z ``[batch, latent_dim]``."""
        z = z.to(self.down_weight.dtype)
        middle = torch.baddbmm(self.down_bias, z.expand(len(self.down_weight), -1, -1), self.down_weight.mT)
        states = torch.baddbmm(self.up_bias, nn.functional.gelu(middle), self.up_weight.mT)
        states = states.unflatten(2, (self.slots, -1))
        if self.norm_bias is not None:
            return nn.functional.layer_norm(states, states.shape[-1:], eps=self.eps) * self.norm_weight + self.norm_bias
        return nn.functional.rms_norm(states, states.shape[-1:], eps=self.eps) * self.norm_weight

    def forward(
        self,
        z: Tensor,
        *,
        dtype: torch.dtype,
        seed: Tensor | int | None = None,
        slots: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Memory ``[layers, 2, batch, kv_heads, slots, head_dim]`` in ``dtype`` for z ``[batch, latent_dim]``.

        seed, slots: of no effect here: there is no dropout, and all slots are seen by all. out: a tensor of that shape to
        write instead, without a gradient.
        """
        maps = self.own if self.own is not None else self.shared
        assert maps is not None
        parts: list[Tensor] = []
        for layer, states in enumerate(self.states(z).unbind(0)):
            own = maps.layer(layer)
            turn = None if self.turns is None else self.turns[layer]
            key, value = keys_and_values(own, states.to(own.key.weight.dtype), self.kv_heads, turn)
            if out is not None:
                out[layer, 0].copy_(key)
                out[layer, 1].copy_(value)
            else:
                parts += [key.to(dtype), value.to(dtype)]
        return out if out is not None else torch.stack(parts).unflatten(0, (-1, 2))


def _linears(layers: int, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights ``[layers, out, width]`` and biases ``[layers, 1, out]`` as nn.Linear begins them."""
    bound = 1.0 / math.sqrt(width)
    weight, bias = nn.Parameter(torch.empty(layers, out, width)), nn.Parameter(torch.empty(layers, 1, out))
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)
    return weight, bias


def _stacked(tensors: list) -> nn.Parameter:
    """A parameter of its own with the layers' values; float32 at least, for it trains."""
    stack = torch.stack([tensor.detach() for tensor in tensors])
    return nn.Parameter(stack.to(torch.promote_types(stack.dtype, torch.float32)))
