"""Where a tensor of the public code's files stands in our model: its Llama form, and the older one on GPT-2."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

View = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """One of our parameters by name, and the part of it that a file's tensor is."""

    name: str
    view: View

    def of(self, tensor: Tensor) -> Tensor:
        """That part of the parameter, or of its gradient, as a view."""
        return self.view(tensor)


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _layer(layer: int) -> View:
    """One layer of a tensor ``[layers, 1, .., width]`` or ``[layers, ..]``."""

    def view(tensor: Tensor) -> Tensor:
        own = tensor[layer]
        while own.dim() > 1 and own.shape[0] == 1:
            own = own[0]
        return own

    return view


# A file's name, as a pattern, and ours; ``{n}`` is a layer that is a name's part, ``[n]`` one of a stacked tensor.
_LLAMA = (
    (r"latent_encoder\.embed_tokens\.weight", "encoder.embedding.weight"),
    (r"latent_encoder\.embed_latent_queries\.weight", "encoder.query"),
    (r"latent_encoder\.layers\.(\d+)\.(.+)", "encoder.layers.layers.{n}.{rest}"),
    (r"latent_encoder\.norm\.weight", "encoder.norm_weight"),
    (r"latent_decoder\.latent_adapters\.(\d+)\.norm\.weight", "projector.norm_weight[n]"),
    (r"latent_decoder\.latent_adapters\.(\d+)\.self_attn\.(k|v)_proj\.(weight|bias)", "projector.own.{kv}_{rest}[n]"),
    (r"latent_decoder\.skip_connection\.3\.weight", "residual.norm_weight"),
    (r"latent_decoder\.z2emb\.(.+)", "embedding_shift.net.{rest}"),
    (r"z2logits\.2\.weight", "bag_of_words.weight"),
    (r"z2logits\.(.+)", "bag_of_words.net.{rest}"),
    (r"latent_decoder\.(model\..+|lm_head\..+)", "decoder.model.{rest}"),
)
_GPT2 = (
    (r"latent_encoder\.wte\.weight", "encoder.embedding.weight"),
    (r"latent_encoder\.latent_queries", "encoder.query"),
    (r"latent_encoder\.ln_input\.(.+)", "encoder.input_norm.{rest}"),
    (r"latent_encoder\.blocks\.(\d+)\.(.+)", "encoder.layers.h.{n}.{rest}"),
    (r"latent_encoder\.ln_output\.(weight|bias)", "encoder.norm_{rest}"),
    (r"latent_decoder\.latent_translators\.(\d+)\.ln\.(weight|bias)", "projector.norm_{rest}[n]"),
    (r"latent_decoder\.(transformer\..+|lm_head\..+)", "decoder.model.{rest}"),
)
_BOTH = (
    (r"latent_encoder\.h2z\.0\.(.+)", "posterior_head.hidden.{rest}"),
    (r"latent_encoder\.h2z\.2\.(.+)", "posterior_head.out.{rest}"),
    (r"latent_decoder\.latent_(?:adapters|translators)\.(\d+)\.z2h\.0\.(weight|bias)", "projector.down_{rest}[n]"),
    (r"latent_decoder\.latent_(?:adapters|translators)\.(\d+)\.z2h\.2\.(weight|bias)", "projector.up_{rest}[n]"),
    (r"latent_decoder\.skip_connection\.(.+)", "residual.net.{rest}"),
)
# Copies that take no part in the result, and what older files carry besides parameters.
_UNUSED = re.compile(
    r"latent_decoder\.latent_adapters\.\d+\.self_attn\.(q_proj|o_proj)\.(weight|bias)"
    r"|latent_decoder\.latent_translators\.\d+\.attn\.c_proj\.(weight|bias)"
    r"|.*\.attn\.(bias|masked_bias)"
    r"|.*\.rotary_emb\.inv_freq"
)


def is_unused(name: str) -> bool:
    """Whether a file's tensor has no place in our model: the adapters' query and output projections, masks, angles."""
    return _UNUSED.fullmatch(name) is not None


def place_of(name: str) -> Place | None:
    """Where a file's tensor stands; None for a name that is no part of either form. GPT-2's fused projections have two
    places: see :func:`fused_places`."""
    for pattern, ours in (*_LLAMA, *_GPT2, *_BOTH):
        found = re.fullmatch(pattern, name)
        if found:
            parts = list(found.groups())
            layer = int(parts.pop(0)) if "{n}" in ours or "[n]" in ours else 0
            kv = {"k": "key", "v": "value"}[parts.pop(0)] if "{kv}" in ours else ""
            rest = parts[0] if parts else ""
            stacked = ours.endswith("[n]")
            target = ours.removesuffix("[n]").format(n=layer, rest=rest, kv=kv)
            return Place(target, _layer(layer) if stacked else _whole)
    return None


def fused_places(name: str) -> list[tuple[Place, View]] | None:
    """For a GPT-2 adapter's fused projection: the places of its keys and values, and which part of the file's tensor each is;
    None for any other name."""
    found = re.fullmatch(r"latent_decoder\.latent_translators\.(\d+)\.attn\.c_attn\.(weight|bias)", name)
    if found is None:
        return None
    layer, kind = int(found[1]), found[2]
    return [
        (Place(f"projector.own.{part}_{kind}", _layer(layer)), _third(which))
        for which, part in ((1, "key"), (2, "value"))
    ]


def _third(which: int) -> View:
    def view(tensor: Tensor) -> Tensor:
        part = tensor.chunk(3, dim=-1)[which]
        return part.mT if part.dim() == 2 else part

    return view
