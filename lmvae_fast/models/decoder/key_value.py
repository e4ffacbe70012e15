"""A decoder's own key and value projections, for states that are no tokens: found once, and proved on a sample.

Whatever a family calls them, a layer's keys and values are linear maps of the normed state that its attention reads, perhaps
normed by head, keys then turned by their position. Where that is not so (latent attention as in DeepSeek), it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmvae_fast.errors import UnsupportedDecoderError
from lmvae_fast.models.decoder.attention import RecordingAttention
from lmvae_fast.models.decoder.decoder import Decoder

_TOLERANCE = 1e-4  # of fp32; another order of the same sums
_REMEDY = (
    "use a decoder with plain key and value projections (GPT-2, Llama, Mistral, Qwen, Phi-3, OPT), or another projector"
)


class Projection(NamedTuple):
    """A linear map to all heads: weight ``[kv_heads * head_dim, hidden]``, bias or None. Views of the module's own."""

    weight: Tensor
    bias: Tensor | None


class LayerKeyValue(NamedTuple):
    """One layer's maps; ``norm`` acts on keys by head, or is None."""

    key: Projection
    value: Projection
    norm: nn.Module | None


@dataclass
class SeenKeysValues(RecordingAttention):
    """Every layer's keys and values ``[T, kv_heads, head_dim]`` as attention gets them."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer, query, key, value, *, scale, window, softcap, sinks=None):
        """See :class:`~lmvae_fast.models.decoder.attention.AttentionContext`."""
        self.keys[layer], self.values[layer] = key, value
        return super().attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)


class KeyValueMaps:
    """The key and value maps of every layer of a decoder.

    It holds the decoder's attention modules and no parameter of its own: what it reads is the decoder's at every call.

    Attributes:
        turns: cosines and sines by which keys at positions 0 .. slots - 1 are turned, ``[layers, 2, slots, width]`` for the
            first ``width`` numbers of a key; None in a decoder that turns none.

    Args:
        decoder: whose maps they are.
        slots: positions.

    Raises:
        UnsupportedDecoderError: naming the decoder's attention and what is missing, where keys and values are no such maps.
    """

    def __init__(self, decoder: Decoder, slots: int):
        self.heads, self.kv_heads, self.head_dim = decoder.num_heads, decoder.kv_heads, decoder.head_dim
        states, seen, self.turns = _examine(decoder, slots)
        self.modules = [seen.modules[layer] for layer in range(decoder.num_layers)]
        for layer, state in enumerate(states):
            self._prove(layer, state, seen)

    def layer(self, layer: int) -> LayerKeyValue:
        """The maps of one layer."""
        module = self.modules[layer]
        key, value = _projections(module, self.heads, self.kv_heads, self.head_dim)
        return LayerKeyValue(key, value, getattr(module, "k_norm", None))

    @torch.no_grad()
    def _prove(self, layer: int, state: Tensor, seen: SeenKeysValues) -> None:
        turn = None if self.turns is None else self.turns[layer]
        key, value = keys_and_values(self.layer(layer), state, self.kv_heads, turn)
        for name, got, want in (("keys", key, seen.keys[layer]), ("values", value, seen.values[layer])):
            got, want = got[0].transpose(0, 1).float(), want.float()
            eps = torch.finfo(state.dtype).eps
            if got.shape != want.shape or not (got - want).norm() <= max(_TOLERANCE, 8 * eps) * want.norm():
                raise UnsupportedDecoderError(
                    f"the {name} of {type(self.modules[layer]).__name__} are no plain map of its input that an adapter could "
                    "share", value=f"layer {layer}", remedy=_REMEDY,
                )  # fmt: skip


def keys_and_values(maps: LayerKeyValue, states: Tensor, kv_heads: int, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values, each ``[batch, kv_heads, slots, head_dim]``, of states ``[batch, slots, hidden]``.

    turn: cosines and sines ``[2, slots, width]``, or None.
    """
    key = nn.functional.linear(states, *maps.key).unflatten(-1, (kv_heads, -1))
    value = nn.functional.linear(states, *maps.value).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    key = (key if maps.norm is None else maps.norm(key)).transpose(1, 2)
    return key if turn is None else turned(key, turn[0], turn[1]), value


def turned(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position on the first ``cos.shape[-1]`` numbers of keys ``[..., slots, head_dim]``, halves paired."""
    width = cos.shape[-1]
    part, rest = key[..., :width], key[..., width:]
    first, second = part.chunk(2, dim=-1)
    part = part * cos.to(key.dtype) + torch.cat([-second, first], dim=-1) * sin.to(key.dtype)
    return torch.cat([part, rest], dim=-1) if rest.shape[-1] else part


def _examine(decoder: Decoder, slots: int) -> tuple[list[Tensor], SeenKeysValues, Tensor | None]:
    """`states_of` one sentence of ``slots`` tokens at positions 0 .. slots - 1."""
    device = decoder.device
    ids = torch.arange(1, slots + 1, device=device) * 7 % decoder.vocab_size
    seen = SeenKeysValues(None, "prefix", torch.tensor([0, slots], dtype=torch.int32, device=device), slots)
    states, turns = states_of(decoder, ids, torch.arange(slots, device=device), seen)
    return states, seen, turns


@torch.no_grad()
def states_of(
    decoder: Decoder, ids: Tensor, positions: Tensor, seen: SeenKeysValues
) -> tuple[list[Tensor], Tensor | None]:
    """What every layer's attention reads ``[1, T, hidden]`` in one pass over packed tokens, and the cosines and sines that it
    is given for their positions ``[layers, 2, T, width]``, or None; ``seen`` notes what it makes of them.

    Raises UnsupportedDecoderError for an attention without key and value projections of a known name.
    """
    states: dict[int, Tensor] = {}
    turns: dict[int, Tensor] = {}

    def watch(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        states[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if (turn := kwargs.get("position_embeddings")) is not None:
            turns[module.layer_idx] = torch.cat(list(turn)).clone()

    hooks = [
        module.register_forward_pre_hook(watch, with_kwargs=True)
        for module in decoder.body.modules()
        if hasattr(module, "layer_idx") and any(hasattr(module, name) for name in _NAMES)
    ]
    try:
        decoder.run(ids, positions, None, seen)
    finally:
        for hook in hooks:
            hook.remove()
    layers = range(decoder.num_layers)
    for layer in layers:
        if layer not in states:
            raise UnsupportedDecoderError(
                f"{type(seen.modules[layer]).__name__} has no key and value projections that an adapter could share",
                value=f"layer {layer}", limit=f"one of {', '.join(_NAMES)}", remedy=_REMEDY,
            )  # fmt: skip
    found = torch.stack([turns[layer] for layer in layers]) if len(turns) == len(layers) else None
    return [states[layer] for layer in layers], found


# What families call the module with the maps; the first that a module has is taken.
_NAMES = ("k_proj", "c_attn", "qkv_proj", "query_key_value")


def _projections(module: Any, heads: int, kv_heads: int, head_dim: int) -> tuple[Projection, Projection]:
    """Key and value maps of an attention module, as views of its weights."""
    if hasattr(module, "k_proj"):
        key, value = module.k_proj, module.v_proj
        return Projection(key.weight, key.bias), Projection(value.weight, value.bias)
    width = kv_heads * head_dim
    if hasattr(module, "c_attn"):  # transposed, and query, key, value in a row
        rows, bias = module.c_attn.weight.t(), module.c_attn.bias
    elif hasattr(module, "qkv_proj"):
        rows, bias = module.qkv_proj.weight, module.qkv_proj.bias
    else:  # query, key and value of each head together
        rows, bias = module.query_key_value.weight, module.query_key_value.bias
        split = rows.view(heads, 3, head_dim, -1)
        biases = None if bias is None else bias.view(heads, 3, head_dim)
        return tuple(  # type: ignore[return-value]
            Projection(split[:, part].reshape(width, -1), None if biases is None else biases[:, part].reshape(-1))
            for part in (1, 2)
        )
    first = heads * head_dim
    parts = (slice(first, first + width), slice(first + width, first + 2 * width))
    return tuple(Projection(rows[part], None if bias is None else bias[part]) for part in parts)  # type: ignore[return-value]
