"""What about a model's build keeps a memory out of it, for refusals that say so rather than where our attention stumbled."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Layers that keep a state, or look at a few neighbours, in the place of keys and values.
_KEYLESS = ("linear", "mamba", "conv", "recurrent", "rwkv", "lstm")
# Types that say nothing of it in their configuration.
_BY_TYPE = {
    "rwkv": "has layers without keys and values, which a memory cannot reach: each keeps a running state",
    "reformer": "attends by hashing or in chunks over cached hidden states, so that there are no keys and values",
    "xlnet": "reads in the order of a permutation mask, not from left to right, and caches hidden states",
    "prophetnet": "predicts several tokens at once by streams of queries beside the main one",
    "cpmant": "adds a learned bias by distance and segment to every attention score",
}
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "layers_block_types", "attention_layer_types")


def obstacle(model: PreTrainedModel, config: Any) -> tuple[str, Any] | None:
    """What of a model a memory cannot reach, as a clause and the value that says so; None where nothing is known.

    config: that of its text decoder.
    """
    kinds = _layer_kinds(config)
    if (keyless := keyless_layers(config)) is not None:
        return keyless
    kind = getattr(config, "model_type", None)
    if kind in _BY_TYPE:
        return _BY_TYPE[kind], kind
    if getattr(config, "causal", None) is False:  # XLM
        return "reads in both directions", "causal=False"
    if getattr(config, "cross_attention_layers", None):
        return "has layers that attend to an image, whose keys and values are not those of the text", (
            f"cross_attention_layers={config.cross_attention_layers}"
        )
    if not any("Attention" in type(module).__name__ for module in model.modules()):
        return "has no attention, so there are no keys and values for a memory", type(model.base_model).__name__
    if (differing := _differing_heads(config)) is not None:
        return "has layers of different head geometry, and a memory has one shape for all", differing
    if getattr(config, "index_topk", None) or any("indexed" in kind or "compressed" in kind for kind in kinds):
        value = getattr(config, "index_topk", None) or sorted(kinds)
        return "lets each token choose the keys it sees by an index of its own, in which memory slots are not", value
    if getattr(config, "num_kv_shared_layers", None):
        return "has layers that read the keys and values of others, so a memory of their own cannot reach them", (
            f"num_kv_shared_layers={config.num_kv_shared_layers}"
        )
    if getattr(config, "patch_in_forward", None):
        return "reads patches of bytes, of which it makes one key and value each", f"patch_size={config.patch_size}"
    if getattr(config, "num_codebooks", 0) and not isinstance(own_embedding(model), nn.Embedding):
        return "reads several codebooks at each position", f"num_codebooks={config.num_codebooks}"
    if getattr(config, "hidden_size_per_layer_input", None):
        return "reads token ids in every layer beside their embeddings", (
            f"hidden_size_per_layer_input={config.hidden_size_per_layer_input}"
        )
    return None


def keyless_layers(config: Any) -> tuple[str, Any] | None:
    """As `obstacle`, from the configuration alone: whether it lists layers that keep a state, in the place of keys and values
    or beside them."""
    kinds = _layer_kinds(config)
    keyless = sorted(kind for kind in kinds if any(part in kind for part in _KEYLESS))
    if keyless:
        return "has layers without keys and values, which a memory cannot reach", ", ".join(keyless)
    hybrid = sorted(kind for kind in kinds if "hybrid" in kind)
    if hybrid:
        return "keeps a state beside keys and values in its layers, which a memory cannot reach", ", ".join(hybrid)
    return None


def _layer_kinds(config: Any) -> set[str]:
    return {str(kind) for name in _LAYER_LISTS for kind in getattr(config, name, None) or ()}


def _differing_heads(config: Any) -> str | None:
    """What a configuration says of heads that differ by layer, or None."""
    fields = ("head_dim", "num_key_value_heads")
    try:
        layers = getattr(config, "per_layer_config", None) or {}
    except AttributeError:  # one that counts no layers under the usual name (BLT)
        return None
    parts = layers.values() if isinstance(layers, dict) else layers
    found = {
        tuple(part.get(name) if isinstance(part, dict) else getattr(part, name, None) for name in fields)
        for part in parts
    }
    return (
        ", ".join(f"head_dim {width} of {heads} heads" for width, heads in sorted(found, key=str))
        if len(found) > 1
        else None
    )


def own_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The module that embeds a model's tokens, or None where it names none."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
