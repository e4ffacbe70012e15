"""A tiny random model of any causal model type that transformers maps, by rules on the names of configuration fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

LAYERS, WINDOW, POSITIONS = 4, 4, 24
# Sizes by the names that configurations give them.
_SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim embed_dim hidden_dim "
    "input_embedding_size output_embedding_size decoder_hidden_size hidden_size_global audio_hidden_size",
    48: "intermediate_size ffn_dim d_inner n_inner decoder_ffn_dim encoder_ffn_dim d_ff dff ffn_hidden_size dim_ff "
    "intermediate_size_mlp dense_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank "
    "qk_head_dim moe_ffn_hidden_size shared_intermediate_size",
    LAYERS: "encoder_layers num_encoder_layers num_hidden_layers n_layer n_layers num_layers decoder_layers "
    "num_decoder_layers num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads",
    1: "n_group topk_group zero_expert_num first_k_dense_replace",
    8: "hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim head_dim kv_channels d_kv global_head_dim "
    "qk_rope_head_dim qk_nope_head_dim dim_head d_head",
    12: "v_head_dim",
    101: "vocab_size padded_vocab_size vocab_size_per_layer_input",
    POSITIONS: "max_encoder_position_embeddings max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k experts_per_token top_k_experts",
    3: "type_vocab_size",
    7: "shape_vocab_size pronunciation_vocab_size",
}  # fmt: skip
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
SIZES["rotary_dim"] = 4
SIZES |= dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4)
_WINDOWS = ("sliding_window", "local_attention", "window_size", "attention_window", "sliding_window_size")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_SPECIAL = {"pad": 0, "bos": 1, "eos": 2}

# What the rules do not find, by type: fields of the configuration; "text_config" is that of a composite one.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MUP = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_KV_SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_SOUND = ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("granite", "granitemoe", "granitemoeshared", "granite_swa", "granitemoe_swa", "hyperclovax"), _MUP
    ),
    **{name: {"use_sliding_window": True, "max_window_layers": 2} for name in ("qwen2", "qwen3")},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **dict.fromkeys(("bamba", "granitemoehybrid"), _MAMBA),
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "blt": {"encoder_hash_byte_group_vocab": 101},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    # Its heads are of another width in layers that see everything.
    "gemma4_text": {"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}}},
    "gemma3n_text": {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, **_KV_SHARED},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "glm_moe_dsa": {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    # Published ones have convolutions; without a list of layers all would attend.
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "esm": {"pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [2, 2], "block_repeats": [1, 1]},
    "musicflamingo": {"audio_config": {"model_type": "audioflamingo3_encoder"}, "text_config": {"model_type": "qwen2"}},
    "neomme": {"head_dim": 16},
    "vibevoice_asr": {name: {"num_filters": 2} for name in _SOUND},
    "t5gemma": {"is_encoder_decoder": False},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 6], "attn_layers": ["local"] * 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


# What cannot be built, by type; where it can after all, it is examined all the same.
ABSENT = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "transformers builds none: by its configuration every layer reads another model's keys and values, which its layers refuse",
) | {"encoder-decoder": "is a pair of two other types, and has no configuration of its own"}


def tiny_config(model_type: str, *, window: int = WINDOW) -> Any:
    """The configuration of a tiny decoder of a type; ``window``: of its sliding layers, if it has any."""
    made = CONFIG_MAPPING[model_type]
    shrunk = _shrunk(made().to_dict(), window)
    return made(**_merged(shrunk, FIELDS.get(model_type, {})))


def tiny_model(model_type: str, *, window: int = WINDOW, seed: int = 0, config: Any = None) -> PreTrainedModel:
    """A random causal LM of a mapped type, fp32, eval mode: matrices N(0, 0.2^2), vectors moved by N(0, 0.1^2).

    config: another than `tiny_config` makes.
    """
    config = tiny_config(model_type, window=window) if config is None else config
    wanted: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    part = getattr(config, "decoder", None)
    if isinstance(part, wanted.config_class):  # MusicGen's text model has no configuration of its own in the mapping
        config = part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (wanted(config) if config is part else AutoModelForCausalLM.from_config(config)).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_encoder_of(model_type: str, vocabulary: int, *, seed: int = 0) -> PreTrainedModel:
    """A random text encoder of a type, fp32, eval mode; of an encoder-decoder its encoder half."""
    made = CONFIG_MAPPING[model_type]
    fields = _with_vocabulary(_shrunk(made().to_dict(), WINDOW), vocabulary)
    if "is_decoder" in fields:
        fields["is_decoder"] = False
    config = made(**_merged(fields, FIELDS.get(model_type, {})))
    auto: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder()
    return model


def _with_vocabulary(fields: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Fields with this vocabulary in every part of a configuration that has one."""
    changed = {
        name: _with_vocabulary(value, vocabulary) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return {name: vocabulary if name == "vocab_size" else value for name, value in changed.items()}


def encoder_types() -> list[str]:
    """Types that transformers maps to a masked language model, a text encoder or a text-to-text model."""
    maps = (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )  # fmt: skip
    return sorted({name for names in maps for name in names})


def mapped_types() -> list[str]:
    """Every causal model type that this transformers maps."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrunk(fields: dict[str, Any], window: int) -> dict[str, Any]:
    layers = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields), None)
    small = {name: _small(name, value, layers, window) for name, value in fields.items() if name not in _DROPPED}
    if fields.get("kv_lora_rank"):  # keys and values of every head are made of one vector
        small["num_key_value_heads"] = SIZES["num_attention_heads"]
    return small


_DROPPED = ("architectures", "transformers_version", "model_type", "dtype", "per_layer_config")


def _small(name: str, value: Any, layers: int | None, window: int) -> Any:
    if isinstance(value, dict):
        return value if name in ("id2label", "label2id") else _shrunk(value, window)
    if isinstance(value, list) and layers and len(value) == layers:
        return _representative(value)
    if name == "is_decoder":
        return True
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in _KV_HEADS and value is not None:
        return 2
    if name.endswith("_token_id"):
        return _SPECIAL.get(name[:3], 3) if whole else 2 if isinstance(value, list) else value
    if name in _WINDOWS and whole:
        return window
    return SIZES[name] if name in SIZES and whole else value


def _representative(kinds: list[Any]) -> list[Any]:
    """Four of a list's values, in their order, with every kind among them if that can be."""
    distinct = list({str(kind): kind for kind in kinds}.values())[:LAYERS]
    chosen = (distinct * LAYERS)[:LAYERS]
    return chosen


def _merged(fields: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in other.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged
