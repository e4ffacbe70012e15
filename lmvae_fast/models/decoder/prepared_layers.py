"""The layers of GPT-2 and of Llama's family over packed weights: what a decoding step on a CPU computes, with few calls.

With a handful of rows, the calls and passes between the products are a part of a step that shows. So these families are
written out here: queries, keys and values are one product, activations and residuals belong to the product
before them. Every other family, and any layer that is not exactly what is written here, keeps Hugging Face's modules. A body is
compared with the modules it stands for before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
from lmvae_fast.models.decoder.attention import AttentionContext, PackedAttention
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.packed_products import Packing, Unlike, require, rounded
from lmvae_fast.models.decoder.rounding import float32_limit, nudged

if TYPE_CHECKING:
    from lmvae_fast.models.decoder.decoder import Decoder

logger = logging.getLogger(__name__)

Layer = Callable[[Tensor, AttentionContext], Tensor]  # hidden states [T, hidden] to those of the next layer
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
    embedded = torch.linspace(-1, 1, 5 * hidden, dtype=decoder.dtype).view(hidden, 5).t().unsqueeze(0)
    offsets, positions = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([[0, 1, 2, 0, 1]])
    embedded, offsets, positions = (tensor.to(decoder.device) for tensor in (embedded, offsets, positions))

    def states(body: Callable[..., Any], dtype: torch.dtype, embedded: Tensor = embedded) -> Tensor:
        attention = PackedAttention(None, "prefix", offsets, 3)
        given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
        return body(inputs_embeds=embedded.to(dtype), **given).last_hidden_state.float()

    ours = states(forward, decoder.dtype)
    with exchanged(rounded(body, weights)):
        theirs = states(body, decoder.dtype)
        if decoder.dtype == torch.float32:
            truth, theirs = theirs, states(body, decoder.dtype, nudged(embedded))
        else:
            with in_float32(body):
                truth = states(body, torch.float32)
    ours_off, theirs_off = (((side - truth).norm() / truth.norm()).item() for side in (ours, theirs))
    if decoder.dtype == torch.float32:
        return ours_off, float32_limit(theirs_off)
    return ours_off, 2 * theirs_off + torch.finfo(decoder.dtype).eps / 2


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def _gpt2(body: Any, packing: Packing) -> Callable[..., SimpleNamespace]:
    layers = [_gpt2_layer(block, index, packing) for index, block in enumerate(body.h)]
    positions, last = body.wpe.weight, body.ln_f

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0) + torch.nn.functional.embedding(position_ids.squeeze(0), positions)
        for layer in layers:
            x = layer(x, lmvae)
        x = layer_norm(x, last.normalized_shape, last.weight, last.bias, last.eps)
        return SimpleNamespace(last_hidden_state=x.unsqueeze(0))

    return forward


def _gpt2_layer(block: Any, index: int, packing: Packing) -> Layer:
    require_gpt2_layer(block)
    attn, mlp, norm1, norm2 = block.attn, block.mlp, block.ln_1, block.ln_2
    qkv, out = packing.linear(attn.c_attn), packing.linear(attn.c_proj)
    up, down = packing.linear(mlp.c_fc, activation="gelu_tanh"), packing.linear(mlp.c_proj)
    shape, scale, heads = norm1.normalized_shape, attn.scaling, attn.num_heads
    first, second = (norm1.weight, norm1.bias, norm1.eps), (norm2.weight, norm2.bias, norm2.eps)

    def layer(x: Tensor, context: AttentionContext) -> Tensor:
        rows = x.shape[0]
        q, k, v = qkv(layer_norm(x, shape, *first)).view(rows, 3, heads, -1).unbind(1)
        seen = context.attend(index, q, k, v, scale=scale, window=None, softcap=None)
        x = out(seen.reshape(rows, -1), x)
        return down(up(layer_norm(x, shape, *second)), x)

    return layer


def require_gpt2_layer(block: Any) -> None:
    """Raises Unlike for a layer that is not exactly what is written out."""
    attn, mlp = block.attn, block.mlp
    require(type(block) is gpt2.GPT2Block and not hasattr(block, "crossattention"), "another kind of block")
    require(type(attn) is gpt2.GPT2Attention and type(mlp) is gpt2.GPT2MLP, "another attention or MLP")
    require(type(mlp.act) is nn.GELU and mlp.act.approximate == "tanh", "another activation")


# ---- Llama, Mistral, Qwen, Gemma -------------------------------------------------------------------------------------


def _llama(body: Any, windows: dict[int, int | None], packing: Packing) -> Callable[..., SimpleNamespace]:
    activation_of(body)
    layers = [_llama_layer(body, block, index, windows[index], packing) for index, block in enumerate(body.layers)]
    last, kinds = rms_of(body.norm), [rotation_of(body, index) for index in range(len(layers))]

    def forward(*, inputs_embeds, position_ids, lmvae, use_cache=False):
        x = inputs_embeds.squeeze(0)
        turns = {kind: [part.transpose(0, 1) for part in both]
                 for kind, both in rotations(body, inputs_embeds, position_ids).items()}  # fmt: skip
        for layer, kind in zip(layers, kinds, strict=True):
            x = layer(x, lmvae, *turns[kind])
        x = _rms_norm(x, *last)
        return SimpleNamespace(last_hidden_state=x.unsqueeze(0))

    return forward


def _llama_layer(body: Any, block: Any, index: int, window: int | None, packing: Packing) -> Callable[..., Tensor]:
    require_llama_layer(body, block)
    attn, mlp = block.self_attn, block.mlp
    qkv = packing.linear(attn.q_proj, attn.k_proj, attn.v_proj)
    first, behind_out, second, behind_down = (None if norm is None else rms_of(norm) for norm in norms_of(block))
    assert first is not None and second is not None
    out = _summed(packing.linear(attn.o_proj), behind_out)
    down = _summed(packing.linear(mlp.down_proj), behind_down)
    gated = _gated(mlp, activation_of(body), packing)
    dim, scale, softcap = attn.head_dim, attn.scaling, softcap_of(attn)
    kv_heads = attn.k_proj.weight.shape[0] // dim
    heads = attn.q_proj.weight.shape[0] // dim
    norms = (rms_of(attn.q_norm), rms_of(attn.k_norm)) if hasattr(attn, "q_norm") else None

    def layer(x: Tensor, context: AttentionContext, cos: Tensor, sin: Tensor) -> Tensor:
        rows = x.shape[0]
        heard = qkv(_rms_norm(x, *first)).view(rows, -1, dim)
        qk, v = heard[:, : heads + kv_heads], heard[:, heads + kv_heads :]
        if norms is not None:
            split = zip(norms, qk.split([heads, kv_heads], dim=1), strict=True)
            qk = torch.cat([_rms_norm(part, *norm) for norm, part in split], dim=1)
        left, right = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-right, left), dim=-1) * sin
        q, k = qk.split([heads, kv_heads], dim=1)
        seen = context.attend(index, q, k, v, scale=scale, window=window, softcap=softcap)
        x = out(seen.reshape(rows, -1), x)
        return down(gated(_rms_norm(x, *second)), x)

    return layer


def _summed(product: Callable[..., Tensor], norm: tuple[Tensor, float] | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A product with what is added to it, or to the norm behind it where there is one."""
    if norm is None:
        return product
    return lambda x, added: added + _rms_norm(product(x), *norm)


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


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype == x.dtype:
        return rms_norm(x, weight.shape, weight, eps)
    return frozen_layer.norm(x.reshape(-1, x.shape[-1]), weight, eps=eps, centred=False)[0].view(x.shape)


def _gated(mlp: Any, kind: str, packing: Packing) -> Callable[[Tensor], Tensor]:
    """``activation(gate(x)) * up(x)``; SiLU belongs to the product itself."""
    require(mlp.gate_proj.bias is None and mlp.up_proj.bias is None, "a bias in a gated layer")
    if kind == "swiglu":
        return packing.gated(mlp.gate_proj, mlp.up_proj)
    both = packing.linear(mlp.gate_proj, mlp.up_proj)
    return lambda x: frozen_layer.activation(both(x), kind)


def require_llama_layer(body: Any, block: Any) -> None:
    """Raises Unlike for a layer that is not exactly what is written out."""
    require((type(block), type(block.self_attn), type(block.mlp)) == LLAMAS[type(body)], "another kind of layer")
