"""Cost of a training step of an encoder and decoder pair, counted on the meta device: nothing is allocated or computed.

The step that is counted is the one that runs: the Hugging Face modules with our attention, latent_kv and lm_head_loss,
forward and backward, on tensors that have shapes only. What trains is a recipe (``RECIPES``); see docs/compute.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.kernels.latent_attention.visibility import visibility_code
from lmvae_fast.models.decoder.activations import fuse_activations
from lmvae_fast.models.decoder.attention import ATTENTION, without_attention_dropout
from lmvae_fast.profiling.cost import Cost

META = torch.device("meta")
MOMENT_BYTES = 8  # AdamW keeps two float32 numbers for each parameter it trains


@dataclass(frozen=True)
class Recipe:
    """A system's way to train a pair.

    decoder: what of it trains: "nothing", "embeddings" (token embedding and head) or "all". encoder: whether it trains.
    projector: "linear" (own K and V per slot), "mlp" (linear after a GELU layer of 4 * latent_dim) or "shared" (one
    vector per layer as key and value, and a shift of the embeddings). slots: None for one more than there are positions.
    """

    decoder: str
    encoder: bool
    projector: str
    visibility: str
    slots: int | None


RECIPES = {
    "langvae": Recipe("nothing", encoder=False, projector="linear", visibility="rolling", slots=None),
    "optimus": Recipe("all", encoder=True, projector="shared", visibility="prefix", slots=1),
    # LlaMaVAE's latent width, slot count and MLP are not published: these are this package's
    "llamavae": Recipe("embeddings", encoder=False, projector="mlp", visibility="prefix", slots=1),
}


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step: ``batch`` sentences of ``tokens`` tokens each, for encoder and decoder alike; ``max_len`` sizes the
    memory of recipes with a slot per position (a step makes the slots that its tokens can see); a latent of ``latent_dim``."""

    batch: int = 32
    tokens: int = 16
    latent_dim: int = 128
    max_len: int = 32


class _MetaAttention:
    """An attention context that calls latent_attention's primitive, which has shapes on every device; the public op would
    choose plain torch here. Fields as in ``models.decoder.attention.PackedAttention``."""

    def __init__(self, memory: Tensor, visibility: str, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self._layers = [layer.unbind(0) for layer in memory.unbind(0)]
        self._where = (cu_seqlens, visibility_code(visibility))
        self._longest = max_seqlen

    def attend(self, layer, query, key, value, *, scale, window, softcap):
        memory = self._layers[layer]
        options = (scale, self._longest, window, softcap)
        return torch.ops.lmvae_fast.latent_attention_fwd(query, key, value, *memory, *self._where, *options)[0]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages kept for backward, those of ``model``'s own parameters and buffers left out."""

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._own = {t.untyped_storage()._cdata for t in own}
        self._held: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._held[storage._cdata] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._held.values())


def count_run(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs, and bytes kept for backward, of ``forward()`` and, where its result has a graph, of the backward."""
    saved = SavedBytes(model)
    with Cost() as cost:
        with saved:
            out = forward()
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return sum(cost.flops.values()), saved.total


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def head_geometry(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, kv_heads and head_dim of a decoder, from its configuration."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _embedding_width(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


class _Maps(nn.Module):
    """The parameters that a recipe adds to the decoder, and the memory and embedding shift they make of z."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, shape: StepShape) -> None:
        super().__init__()
        layers, kv_heads, head_dim = head_geometry(model)
        width, nz = _embedding_width(model), shape.latent_dim
        self.kind, self.geometry = recipe.projector, (layers, kv_heads, head_dim)
        slots = shape.max_len + 1 if recipe.slots is None else recipe.slots
        self.memory_shape = (layers, 2, kv_heads, slots, head_dim)
        self.made = slots if recipe.slots is not None else min(slots, shape.tokens)  # slots that some token can see
        options: Any = {"device": META, "bias": False}
        if self.kind == "shared":
            self.memory = nn.Linear(nz, layers * kv_heads * head_dim, **options)
            self.shift = nn.Linear(nz, width, **options)
            return
        inner = 4 * nz if self.kind == "mlp" else nz
        self.hidden = nn.Linear(nz, inner, device=META) if self.kind == "mlp" else None
        self.weight = nn.Parameter(torch.empty(*self.memory_shape, inner, device=META))
        self.bias = nn.Parameter(torch.empty(self.memory_shape, device=META))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.kind == "shared":
            layers, kv_heads, head_dim = self.geometry
            vectors = self.memory(z).view(-1, layers, kv_heads, head_dim).transpose(0, 1)
            return vectors[:, None, :, :, None].expand(-1, 2, -1, -1, -1, -1), self.shift(z)
        if self.hidden is not None:
            z = nn.functional.gelu(self.hidden(z))
        weight, bias = (x[:, :, :, : self.made] for x in (self.weight, self.bias))
        return torch.ops.lmvae_fast.latent_kv_fwd(z, weight, bias, 0.0, None, z.dtype), None

    def gradient_bytes(self, batch: int) -> int:
        """Bytes of its own gradients: latent_kv's weight is updated without one, from the gradient of the memory."""
        if self.kind == "shared":
            return 4 * parameter_count(self)
        memory = batch * self.bias[:, :, :, : self.made].numel()
        return 4 * (parameter_count(self) - self.weight.numel() + memory)


def count_encoder(model: PreTrainedModel, shape: StepShape, *, trains: bool) -> tuple[int, int]:
    """FLOPs and activation bytes of the encoder over the batch: forward, and backward where it trains."""
    model.requires_grad_(trains).train(trains)
    ids = torch.zeros(shape.batch, shape.tokens, dtype=torch.int64, device=META)

    def forward() -> Tensor:
        with torch.set_grad_enabled(trains):
            out = model(input_ids=ids)
            pooler = getattr(model, "pooler", None)  # Optimus reads it; a frozen encoder is pooled by the mean
            return out.pooler_output if trains and pooler is not None else out.last_hidden_state.mean(1)

    return count_run(model, forward)


def count_decoder(model: PreTrainedModel, shape: StepShape, recipe: Recipe) -> tuple[int, int, _Maps]:
    """FLOPs, activation bytes and the added maps of injection, body and head, forward and backward."""
    model.set_attn_implementation(ATTENTION)
    fuse_activations(model)
    for module in model.modules():
        without_attention_dropout(module)
    everything = recipe.decoder == "all"
    model.requires_grad_(everything).train(everything)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if recipe.decoder == "embeddings":
        embedding.requires_grad_(True)
        head.requires_grad_(True)
    maps = _Maps(model, recipe, shape)
    ids = torch.zeros(shape.batch * shape.tokens, dtype=torch.int64, device=META)
    cu_seqlens = torch.zeros(shape.batch + 1, dtype=torch.int32, device=META)
    z = torch.empty(shape.batch, shape.latent_dim, device=META, requires_grad=True)

    def forward() -> Tensor:
        memory, shift = maps(z)
        embedded = embedding(ids)
        if shift is not None:
            embedded = embedded + shift.repeat_interleave(shape.tokens, 0, output_size=len(ids))
        context = _MetaAttention(memory, recipe.visibility, cu_seqlens, shape.tokens)
        out = model.base_model(
            inputs_embeds=embedded.unsqueeze(0), position_ids=ids.unsqueeze(0), use_cache=False, lmvae=context
        )
        hidden, weight = out.last_hidden_state.squeeze(0), head.weight
        run = torch.ops.lmvae_fast.lm_head_loss_fwd
        return run(hidden, weight, ids, None, None, 0.0, 1.0, 0, hidden.requires_grad, weight.requires_grad, False)[0]

    flops, activations = count_run(nn.ModuleList([model, maps]), forward)
    return flops, activations, maps


@dataclass(frozen=True)
class PairCost:
    """Cost of a training step of one pair under one recipe, the whole batch; bytes are of float32 training.

    parameters: of the two pretrained models. trainable: what the optimizer holds. flops: of the step. encoder_once_flops:
    of the one pass over a frozen encoder whose outputs are then kept (no part of the step). optimizer_bytes: AdamW's two
    moments. gradient_bytes: of what trains, but for the weight of latent_kv, whose gradient is never made.
    activation_bytes: kept for backward. weight_bytes: of what a step needs: a frozen encoder is not among it.
    """

    parameters: int
    trainable: int
    flops: int
    encoder_once_flops: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    weight_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Estimate of what a step holds at most: weights, moments, gradients, activations."""
        return self.weight_bytes + self.optimizer_bytes + self.gradient_bytes + self.activation_bytes

    @property
    def fine_tuned_share(self) -> float:
        """Share of the pair's parameters that trains: LangVAE's paper counts its reduction so."""
        return self.trainable / self.parameters


def count_pair(encoder: PreTrainedModel, decoder: PreTrainedModel, shape: StepShape, recipe: Recipe) -> PairCost:
    """Count a step of two models on the meta device (their requires_grad flags are left as the recipe has them)."""
    encoder_flops, encoder_activations = count_encoder(encoder, shape, trains=recipe.encoder)
    flops, activations, maps = count_decoder(decoder, shape, recipe)
    posterior = encoder.config.hidden_size * 2 * shape.latent_dim
    # forward and the gradient of the weight; of the features only where the encoder trains
    flops += (6 if recipe.encoder else 4) * shape.batch * posterior
    added = posterior + parameter_count(maps)
    tuned = sum(p.numel() for model in (encoder, decoder) for p in model.parameters() if p.requires_grad)
    held = parameter_count(decoder) + added + (parameter_count(encoder) if recipe.encoder else 0)
    return PairCost(
        parameters=parameter_count(encoder) + parameter_count(decoder),
        trainable=tuned + added,
        flops=flops + encoder_flops * recipe.encoder,
        encoder_once_flops=encoder_flops * (not recipe.encoder),
        optimizer_bytes=MOMENT_BYTES * (tuned + added),
        gradient_bytes=4 * (tuned + posterior) + maps.gradient_bytes(shape.batch),
        activation_bytes=activations + encoder_activations,
        weight_bytes=4 * held,
    )
