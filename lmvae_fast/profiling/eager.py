"""The eager reference of a model: the baseline that a profile shows beside the fast path, with copies of its weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lmvae_fast.config import TrainConfig
from lmvae_fast.kernels import backend
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.projectors import LinearProjector, SharedProjector
from lmvae_fast.reference.langvae import ReferenceLangVAE
from lmvae_fast.reference.optimus import ReferenceOptimus


class EagerStep:
    """A training step of ``model``'s eager reference on ``texts``: forward, backward, clipping, AdamW.

    A LangVAE gets the sequential LangVAE (its own greedy output or the sentence's tokens, as the model is configured), an
    Optimus the eager Optimus; any other combination of parts gets the model's own pass with every op in plain torch.
    ``name`` says which. Memory for a second copy of both models is needed.
    """

    def __init__(self, model: LMVAE, texts: Sequence[str], config: TrainConfig) -> None:
        self.config, self.dtype = config, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        self._within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.model: nn.Module
        if model.config.system == "langvae" and _is_langvae(model):
            self.name = "LangVAE, token by token, in eager torch"
            self.model, self._loss = _langvae(model, texts)
        elif _is_optimus(model):
            self.name = "Optimus in eager torch"
            self.model, self._loss = _optimus(model, texts)
        else:
            self.name = "the same pass with every op in plain torch"
            self.model, self._loss = _plain(model, texts)
            self._within = lambda: backend.backend("reference")
        self.device = next(self.model.parameters()).device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None), self._within():
            loss = self._loss()
        loss.backward()
        self.update()

    def update(self) -> None:
        """Clip, AdamW, forget the gradients."""
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held_bytes(self) -> int:
        """Bytes that stay between steps: weights and optimizer state."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *state))


def _is_langvae(model: LMVAE) -> bool:
    projector, config = model.projector, model.config
    linear = isinstance(projector, LinearProjector) and projector.hidden is None and model.embedding_shift is None
    frozen = not (model.encoder.trains or model.decoder.trains)
    return linear and frozen and config.visibility == "rolling" and _is_published(model)


def _is_optimus(model: LMVAE) -> bool:
    return (
        model.config.system == "optimus" and isinstance(model.projector, SharedProjector)
        and model.encoder.trains and model.decoder.trains and _is_published(model)
    )  # fmt: skip


def _is_published(model: LMVAE) -> bool:
    """Whether a posterior head and what is read are as the eager implementations of published systems have them."""
    config = model.config
    plain = config.posterior_init == "random" and config.pooling != "segments" and config.encoder_layer is None
    return plain and config.start_token is None and not (config.annotations or config.token_dropout)


def _copies(model: LMVAE) -> tuple[Any, Any, Any, Any]:
    """Copies of both Hugging Face models and tokenizers; the decoder with its own eager attention again."""
    decoder = copy.deepcopy(model.decoder.model)
    decoder.set_attn_implementation("eager")
    tokenizers = copy.deepcopy((model.encoder.tokenizer, model.decoder.tokenizer.tokenizer))
    return copy.deepcopy(model.encoder.model), tokenizers[0], decoder, tokenizers[1]


def _langvae(model: LMVAE, texts: Sequence[str]) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    config, projector = model.config, model.projector
    assert isinstance(projector, LinearProjector)
    reference = ReferenceLangVAE(
        *_copies(model), latent_dim=config.latent_dim, max_len=config.max_len, pooling=str(config.pooling),
        normalize=bool(config.normalize), dropout=float(config.projector_dropout or 0.0),
    ).to(model.device)  # fmt: skip
    with torch.no_grad():
        reference.linear.weight.copy_(model.posterior_head.weight)
        for layer, linear in enumerate(reference.context_hidden):
            assert isinstance(linear, nn.Linear)
            rows = linear.weight.shape[0]
            linear.weight.copy_(projector.weight[layer][:rows])
            linear.bias.copy_(projector.bias[layer][:rows])
    ids = reference.target_ids(texts)
    features = reference.pooled(ids)  # computed once, as LangVAE keeps them too
    reference.pooled = lambda target_ids: features  # type: ignore[method-assign]
    options: dict[str, Any] = {"objective": str(config.objective), "teacher_forcing": not config.free_running}
    return reference.train(), lambda: reference.loss(ids, beta=1.0, **options).loss


def _optimus(model: LMVAE, texts: Sequence[str]) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    config, projector, shift = model.config, model.projector, model.embedding_shift
    assert isinstance(projector, SharedProjector)
    reference: Any = ReferenceOptimus(
        *_copies(model), latent_dim=config.latent_dim, max_len=config.max_len, embedding=shift is not None
    ).to(model.device)
    with torch.no_grad():
        reference.linear.weight.copy_(model.posterior_head.weight)
        assert reference.linear_memory is not None
        reference.linear_memory.weight.copy_(projector.weight)
        if shift is not None and reference.linear_embedding is not None:
            reference.linear_embedding.weight.copy_(shift.weight)
    return reference.train(), lambda: reference.loss(texts, beta=1.0).loss


def _plain(model: LMVAE, texts: Sequence[str]) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = copy.deepcopy(model)
    sentences = model.tokenize(texts)
    pooled = None if model.encoder.trains else model.pool(sentences)
    batch = model.make_batch(sentences, pooled=pooled).to(model.device)
    return model.train(), lambda: model(batch, beta=1.0).loss
