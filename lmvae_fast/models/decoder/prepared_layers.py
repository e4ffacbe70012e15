"""The layers of GPT-2 and of Llama's family over packed weights: what a decoding step on a CPU computes, with few calls.

With a handful of rows, the calls and passes between the products are a part of a step that shows. So these families are
written out here: queries, keys and values are one product, activations and residuals belong to the product
before them. Every other family, and any layer that is not exactly what is written here, keeps Hugging Face's modules. A body is
compared with the modules it stands for before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from lmvae_fast.kernels import frozen_layer
from lmvae_fast.kernels.packed_linear import PackedLinear
from lmvae_fast.models.decoder.attention import AttentionContext, PackedAttention
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.decode_body import DecodeBody, LayerParts, RowNorm
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import exchanged, own_forward
from lmvae_fast.models.decoder.linear_weights import Unlike, require
from lmvae_fast.models.decoder.packed_products import Packing, rounded
from lmvae_fast.models.decoder.rounding import float32_limit, nudged

if TYPE_CHECKING:
    from lmvae_fast.models.decoder.decoder import Decoder

logger = logging.getLogger(__name__)

LLAMAS = {
    llama.LlamaModel: (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP),
    mistral.MistralModel: (mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralMLP),
    qwen2.Qwen2Model: (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP),
    qwen3.Qwen3Model: (qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP),
    gemma.GemmaModel: (gemma.GemmaDecoderLayer, gemma.GemmaAttention, gemma.GemmaMLP),
    gemma2.Gemma2Model: (gemma2.Gemma2DecoderLayer, gemma2.Gemma2Attention, gemma2.Gemma2MLP),
    gemma3.Gemma3TextModel: (gemma3.Gemma3DecoderLayer, gemma3.Gemma3Attention, gemma3.Gemma3MLP),
}
_GEMMA_NORMS = (gemma.GemmaRMSNorm, gemma2.Gemma2RMSNorm, gemma3.Gemma3RMSNorm)
#: Gated activations by the name that configurations have, and what frozen_layer calls them.
GATES = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}


def body_forward(decoder: Decoder, packing: Packing) -> Callable[..., SimpleNamespace] | None:
    """What the decoder's body may call in place of its own forward, or None where its layers are not written out here."""
    return examined(decoder, lambda: _written_out(decoder, packing), packing.weights)


def _written_out(decoder: Decoder, packing: Packing) -> Callable[..., SimpleNamespace] | None:
    body = decoder.body
    if type(body) is gpt2.GPT2Model:
        return _gpt2(body, packing)
    return _llama(body, decoder.windows, packing) if type(body) in LLAMAS else None


def examined(
    decoder: Decoder, make: Callable[[], Callable[..., SimpleNamespace] | None], weights: str | None
) -> Callable[..., SimpleNamespace] | None:
    """What ``make`` makes to stand in for the body's forward, or None: it gives None or raises Unlike, or its values are not
    the modules'. weights: as `Packing` takes them."""
    body = decoder.body
    try:
        forward = make()
        if forward is None:
            return None
        difference, limit = _difference(decoder, forward, weights)
    except (Unlike, torch.OutOfMemoryError) as reason:
        said = str(reason) if isinstance(reason, Unlike) else "there is no room on the device for prepared ones"
        logger.info("%s: layers stay Hugging Face's in decoding: %s", type(body).__name__, said)
        return None
    if not difference <= limit:
        logger.warning(
            "%s: layers stay Hugging Face's in decoding: ours are off by %.1e, more than %.1e",
            type(body).__name__,
            difference,
            limit,
        )
        return None
    return forward


@torch.no_grad()
def _difference(decoder: Decoder, forward: Callable[..., SimpleNamespace], weights: str | None) -> tuple[float, float]:
    """Between our hidden states for two short sentences and those of the modules in fp32, over their norm; and its limit.

    In fp32 as `float32_limit` says; in bf16 the modules are off, too: ours may be by twice as much. With weights in int8 both
    sides have those.
    """
    hidden, body = decoder.hidden_size, decoder.body
    plain = own_forward(body)  # also while training has its layers in the modules' place
    embedded = torch.linspace(-1, 1, 5 * hidden, dtype=decoder.dtype).view(hidden, 5).t().unsqueeze(0)
    offsets, positions = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([[0, 1, 2, 0, 1]])
    embedded, offsets, positions = (tensor.to(decoder.device) for tensor in (embedded, offsets, positions))

    def states(body: Callable[..., Any], dtype: torch.dtype, embedded: Tensor = embedded) -> Tensor:
        attention = PackedAttention(None, "prefix", offsets, 3)
        given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
        return body(inputs_embeds=embedded.to(dtype), **given).last_hidden_state.float()

    ours = (states(forward, decoder.dtype), _stepped(decoder, forward, embedded[0]))
    with exchanged(rounded(body, weights)):
        theirs = states(plain, decoder.dtype)
        if decoder.dtype == torch.float32:
            truth, theirs = theirs, states(plain, decoder.dtype, nudged(embedded))
        else:
            with in_float32(body):
                truth = states(plain, torch.float32)
    *each, theirs_off = (((side - truth).norm() / truth.norm()).item() for side in (*ours, theirs))
    ours_off = torch.tensor(each).max().item()  # Python's max would pass over a NaN
    if decoder.dtype == torch.float32:
        return ours_off, float32_limit(theirs_off)
    return ours_off, 2 * theirs_off + torch.finfo(decoder.dtype).eps / 2


def _stepped(decoder: Decoder, forward: Callable[..., SimpleNamespace], embedded: Tensor) -> Tensor:
    """Hidden states of the same sentences, of 3 tokens and of 2, read token by token over a cache, which has its own way."""
    cache = LatentCache(
        layers=decoder.num_layers, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, batch=2, slots=0, max_tokens=3,
        visibility="prefix", dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    steps = []
    for token in range(3):
        cache.prepare()
        rows = embedded[[token, min(3 + token, 4)]].unsqueeze(0)
        out = forward(inputs_embeds=rows, position_ids=cache.position_ids().unsqueeze(0), lmvae=cache)
        steps.append(out.last_hidden_state.squeeze(0).float())
        cache.advance()
    return torch.stack([*(step[0] for step in steps), *(step[1] for step in steps[:2])]).unsqueeze(0)


# ---- a layer ---------------------------------------------------------------------------------------------------------


def _states(
    x: Tensor,
    layers: list[LayerParts],
    last: RowNorm,
    context: AttentionContext,
    decode: DecodeBody,
    turns: Sequence[Tensor],
) -> SimpleNamespace:
    """The body's output for packed hidden states ``[T, hidden]``."""
    if decode.takes(x, context):
        x = decode.step(x, cast(LatentCache, context), turns)
    else:
        for index, layer in enumerate(layers):
            x = _layer(layer, index, x, context, turns)
        x = _norm(x, last)
    return SimpleNamespace(last_hidden_state=x.unsqueeze(0))


def _layer(layer: LayerParts, index: int, x: Tensor, context: AttentionContext, turns: Sequence[Tensor]) -> Tensor:
    """Hidden states ``[T, hidden]`` after a layer."""
    rows, turned = x.shape[0], layer.heads + layer.kv_heads
    qkv = layer.qkv(_norm(x, layer.before_attention))
    heads = qkv.view(rows, -1, layer.head_dim)
    if layer.query_norm is not None and layer.key_norm is not None:
        for norm, part in zip((layer.query_norm, layer.key_norm), _split(heads, layer)[:2], strict=True):
            part.copy_(_norm(part, norm))
    if layer.rotation is not None:
        cos, sin = turns[2 * layer.rotation : 2 * layer.rotation + 2]
        frozen_layer.rotate_(qkv, cos, sin, heads=turned)
    options: dict[str, Any] = {"scale": layer.scale, "window": layer.window, "softcap": layer.softcap}
    seen = context.attend(index, *_split(heads, layer), **options).reshape(rows, -1)
    x = _summed(layer.out, layer.behind_attention, seen, x)
    inner = layer.up(_norm(x, layer.before_mlp))
    if layer.gate is not None:
        inner = frozen_layer.activation(inner, layer.gate)
    return _summed(layer.down, layer.behind_mlp, inner, x)


def _split(heads: Tensor, layer: LayerParts) -> tuple[Tensor, ...]:
    return heads.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)


def _summed(product: PackedLinear, norm: RowNorm | None, x: Tensor, added: Tensor) -> Tensor:
    """A product with what is added to it, or to the norm behind it where there is one."""
    return product(x, added) if norm is None else added + _norm(product(x), norm)


def _norm(x: Tensor, norm: RowNorm) -> Tensor:
    if norm.centred:
        return layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    if norm.weight.dtype == x.dtype:
        return rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    return frozen_layer.norm(x.reshape(-1, x.shape[-1]), norm.weight, eps=norm.eps, centred=False)[0].view(x.shape)


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def _gpt2(body: Any, packing: Packing) -> Callable[..., SimpleNamespace]:
    layers = [_gpt2_layer(block, packing) for block in body.h]
    positions, last = body.wpe.weight, _layer_norm_of(body.ln_f)
    decode = DecodeBody(layers, last)

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0) + torch.nn.functional.embedding(position_ids.squeeze(0), positions)
        return _states(x, layers, last, lmvae, decode, ())

    return forward


def _gpt2_layer(block: Any, packing: Packing) -> LayerParts:
    require_gpt2_layer(block)
    attn, mlp = block.attn, block.mlp
    return LayerParts(
        before_attention=_layer_norm_of(block.ln_1),
        before_mlp=_layer_norm_of(block.ln_2),
        qkv=packing.linear(attn.c_attn),
        out=packing.linear(attn.c_proj),
        up=packing.linear(mlp.c_fc, activation="gelu_tanh"),
        down=packing.linear(mlp.c_proj),
        heads=attn.num_heads,
        kv_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scaling,
    )


def _layer_norm_of(module: nn.LayerNorm) -> RowNorm:
    return RowNorm(module.weight, module.bias, module.eps, True)


def require_gpt2_layer(block: Any) -> None:
    """Raises Unlike for a layer that is not exactly what is written out."""
    attn, mlp = block.attn, block.mlp
    require(type(block) is gpt2.GPT2Block and not hasattr(block, "crossattention"), "another kind of block")
    require(type(attn) is gpt2.GPT2Attention and type(mlp) is gpt2.GPT2MLP, "another attention or MLP")
    require(type(mlp.act) is nn.GELU and mlp.act.approximate == "tanh", "another activation")


# ---- Llama, Mistral, Qwen, Gemma -------------------------------------------------------------------------------------


def _llama(body: Any, windows: dict[int, int | None], packing: Packing) -> Callable[..., SimpleNamespace]:
    kinds = [rotation_of(body, index) for index in range(len(body.layers))]
    order = list(dict.fromkeys(kinds))
    layers = [
        _llama_layer(body, block, windows[index], order.index(kinds[index]), packing)
        for index, block in enumerate(body.layers)
    ]
    last = _rms_norm_of(body.norm)
    decode = DecodeBody(layers, last)

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        both = rotations(body, inputs_embeds, position_ids)
        turns = [part.squeeze(0) for kind in order for part in both[kind]]
        return _states(inputs_embeds.squeeze(0), layers, last, lmvae, decode, turns)

    return forward


def _llama_layer(body: Any, block: Any, window: int | None, rotation: int, packing: Packing) -> LayerParts:
    require_llama_layer(body, block)
    attn, mlp, kind = block.self_attn, block.mlp, activation_of(body)
    require(mlp.gate_proj.bias is None and mlp.up_proj.bias is None, "a bias in a gated layer")
    first, behind_out, second, behind_down = (None if norm is None else _rms_norm_of(norm) for norm in norms_of(block))
    assert first is not None and second is not None
    gated = kind == "swiglu"  # which belongs to the product itself
    normed = hasattr(attn, "q_norm")
    return LayerParts(
        before_attention=first,
        before_mlp=second,
        behind_attention=behind_out,
        behind_mlp=behind_down,
        query_norm=_rms_norm_of(attn.q_norm) if normed else None,
        key_norm=_rms_norm_of(attn.k_norm) if normed else None,
        qkv=packing.linear(attn.q_proj, attn.k_proj, attn.v_proj),
        out=packing.linear(attn.o_proj),
        up=packing.gated(mlp.gate_proj, mlp.up_proj) if gated else packing.linear(mlp.gate_proj, mlp.up_proj),
        down=packing.linear(mlp.down_proj),
        gate=None if gated else kind,
        heads=attn.q_proj.weight.shape[0] // attn.head_dim,
        kv_heads=attn.k_proj.weight.shape[0] // attn.head_dim,
        head_dim=attn.head_dim,
        scale=attn.scaling,
        window=window,
        softcap=softcap_of(attn),
        rotation=rotation,
    )


def activation_of(body: Any) -> str:
    """The gated activation of a body's MLPs, as frozen_layer calls it; raises Unlike for one that it does not know."""
    name = "hidden_activation" if type(body) in (gemma2.Gemma2Model, gemma3.Gemma3TextModel) else "hidden_act"
    kind = getattr(body.config, name)
    require(kind in GATES, "another activation")
    return GATES[kind]


def norms_of(block: Any) -> tuple[Any, Any, Any, Any]:
    """A layer's norms: before attention, behind it or None, before the MLP, behind it or None (Gemma 2 and 3 have all four)."""
    if hasattr(block, "pre_feedforward_layernorm"):
        return (
            block.input_layernorm, block.post_attention_layernorm, block.pre_feedforward_layernorm,
            block.post_feedforward_layernorm,
        )  # fmt: skip
    return block.input_layernorm, None, block.post_attention_layernorm, None


def softcap_of(attention: Any) -> float | None:
    """What a layer caps its attention scores at; Gemma 3's has the field, and does not."""
    return attention.attn_logit_softcapping if type(attention) is gemma2.Gemma2Attention else None


def _has_rotations(body: nn.Module) -> bool:
    return type(body) is gemma3.Gemma3TextModel


def rotation_of(body: Any, index: int) -> str | None:
    """Which of a body's rotations a layer has: Gemma 3's sliding layers have one of their own; None where there is one."""
    return body.config.layer_types[index] if _has_rotations(body) else None


def rotations(body: Any, embedded: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Cosines and sines, each ``[1, T, head_dim]``, of every rotation that a body has."""
    if not _has_rotations(body):
        return {None: body.rotary_emb(embedded, position_ids=positions)}
    kinds = dict.fromkeys(body.config.layer_types)
    return {kind: body.rotary_emb(embedded, position_ids=positions, layer_type=kind) for kind in kinds}


def rms_of(module: Any) -> tuple[Tensor, float]:
    """Factors and epsilon of an RMSNorm; Gemma's factors are one more than its weight, in fp32, and then a copy."""
    if isinstance(module, _GEMMA_NORMS):
        return 1.0 + module.weight.detach().float(), module.eps
    return module.weight.detach(), module.variance_epsilon


def _rms_norm_of(module: Any) -> RowNorm:
    weight, eps = rms_of(module)
    return RowNorm(weight, None, eps, False)


def require_llama_layer(body: Any, block: Any) -> None:
    """Raises Unlike for a layer that is not exactly what is written out."""
    require((type(block), type(block.self_attn), type(block.mlp)) == LLAMAS[type(body)], "another kind of layer")
