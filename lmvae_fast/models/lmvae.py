"""The model: encode -> posterior -> injection -> decoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmvae_fast.config import GenerationConfig, LMVAEConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.kernels.registration import tangents
from lmvae_fast.models import inputs, parts
from lmvae_fast.models.auxiliary import told_apart_loss, words_loss
from lmvae_fast.models.checks import check_labels, check_latents, check_posterior
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.free_running import FreeRunning
from lmvae_fast.models.frozen_parts import remember
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.latents import Latents, Noise, draw_latents, stream
from lmvae_fast.models.layer_encoder import LayerEncoder
from lmvae_fast.models.memory_start import start_memory
from lmvae_fast.models.modes import building, evaluating
from lmvae_fast.models.objective import combine, segment_sum, token_weights
from lmvae_fast.models.posterior import Posterior, shared_seed
from lmvae_fast.models.serialization import copy_into, read_model, save_model
from lmvae_fast.models.systems import resolve
from lmvae_fast.models.token_dropout import dropped_tokens
from lmvae_fast.models.token_losses import token_losses, token_losses_in_pieces
from lmvae_fast.text.batch import Batch
from lmvae_fast.text.tokenizer import TokenizedSentences


@dataclass
class LMVAEOutput:
    """What one forward pass returns; B sentences, T tokens.

    ``loss`` scalar; ``reconstruction``, ``kl`` float32 ``[B]``: the terms that entered it, in nats; ``beta`` the weight of
    the KL; ``nll`` ``[T]`` per token; ``tokens`` int64 ``[B]``; ``mu``, ``logvar``, ``z`` ``[B, latent_dim]``; ``auxiliary``
    scalar: what bag of words and contrast added to the loss, or None. Only ``loss`` is meant for backward.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    beta: float | Tensor
    nll: Tensor
    tokens: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    auxiliary: Tensor | None = None


class LMVAE(nn.Module):
    """A language-model VAE.

    Args:
        config: what to build; its open fields are filled from the system's preset (see ``model.config`` afterwards).
        encoder, decoder: the parts, when they are already in memory; loaded by the configuration's names otherwise.

    Raises:
        CheckpointError, TokenizerError, UnsupportedDecoderError, ConfigError: a part cannot be loaded or does not fit.
    """

    def __init__(
        self, config: LMVAEConfig, *, encoder: Encoder | LayerEncoder | None = None, decoder: Decoder | None = None
    ):
        super().__init__()
        with building():
            self._build(resolve(parts.located(config)), encoder, decoder)

    def _build(self, config: LMVAEConfig, encoder: Encoder | LayerEncoder | None, decoder: Decoder | None) -> None:
        decoder = parts.load_decoder(config) if decoder is None else decoder
        encoder = parts.load_encoder(config, decoder) if encoder is None else encoder
        parts.check_parts(config, encoder, decoder)
        self.config, self.decoder = config, decoder
        self.encoder: Any = encoder  # an Encoder, or a LayerEncoder
        for part in (encoder, decoder):
            remember(part)
        self.beta: float | Tensor = 1.0
        self.free_running = FreeRunning()
        parts.check_sizes(config, encoder, decoder)
        self.posterior_head: Any = parts.build_posterior_head(config, encoder, decoder)
        self.projector = parts.build_projector(config, decoder, self.injected_dim)
        self.embedding_shift = parts.build_embedding_shift(config, decoder, self.injected_dim)
        self.residual = parts.build_residual(config, decoder, self.injected_dim)
        self.bag_of_words = parts.build_bag_of_words(config, decoder)
        for module in (self.posterior_head, self.projector, self.embedding_shift, self.residual, self.bag_of_words):
            if module is not None:
                parts.start_latent_map(module, config.latent_init)
                module.to(device=decoder.device, dtype=self.latent_dtype)
        start_memory(config, self.projector, decoder)
        longest = config.max_len + (
            config.max_prompt_len or int(config.prompted)
        )  # something of a prompt is always read
        decoder.check_positions(int(config.slots or 0), longest, str(config.visibility))

    @property
    def injected_dim(self) -> int:
        """Width of what goes into the projector: z, and the pooled labels of a conditional decoder."""
        return self.config.latent_dim + len(self.config.annotations) * self.config.conditional_decoder

    @property
    def latent_dtype(self) -> torch.dtype:
        """Dtype of latents and of what trains: float32 (float64 of a float64 model), whatever the frozen parts are in."""
        return torch.float64 if self.config.dtype == "float64" else torch.float32

    @property
    def _compute_dtype(self) -> torch.dtype:
        """What the decoder computes in: autocast's dtype where it is on, else that of its weights."""
        kind, held = self.device.type, self.decoder.dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and held != torch.float64 else held

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.posterior_head.weight.device

    # Encode ---------------------------------------------------------------------------------------------------------

    def encode(self, sentences: Batch | Sequence[Any]) -> Posterior:
        """Posterior of a batch; or of sentences, then without a graph, in evaluation mode and in batches of 64.

        Raises DataError for an empty sentence, and for what :func:`~lmvae_fast.text.tokenizer.tokenize` refuses;
        NumericalError, of sentences, where a posterior is NaN or infinite (a batch's is not looked at: training does that).
        """
        if isinstance(sentences, Batch):
            return self._posterior(sentences)
        tokenized = self.tokenize(sentences, on_empty="error")
        found = []
        with evaluating(self):
            for start in range(0, len(tokenized), 64):
                rows = range(start, min(start + 64, len(tokenized)))
                found.append(self._posterior(self.make_batch(tokenized, rows).to(self.device)))
        posterior = Posterior(torch.cat([part.mu for part in found]), torch.cat([part.logvar for part in found]))
        check_posterior(posterior.mu, posterior.logvar, tokenized.source_rows)
        return posterior

    def _posterior(self, batch: Batch) -> Posterior:
        pooled = batch.pooled
        if pooled is None:
            pooled = self.encoder.features(batch)
        if batch.annotations is not None:
            pooled = torch.cat([pooled, batch.annotations.to(pooled.dtype)], dim=-1)
        # The posterior is float32 also under autocast: exp(logvar) does not survive 8 bits of mantissa.
        with torch.autocast(pooled.device.type, enabled=False):
            mu, logvar = self.posterior_head(pooled.to(self.posterior_head.weight.dtype)).chunk(2, dim=-1)
        return Posterior(mu, logvar)

    # Inject ---------------------------------------------------------------------------------------------------------

    def inject(
        self,
        z: Tensor,
        annotations: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        tokens: int | None = None,
        out: Tensor | None = None,
        shift_z: Tensor | None = None,
        residual_z: Tensor | None = None,
    ) -> Injection:
        """What latents ``[batch, latent_dim]`` add to the decoder.

        tokens: the most tokens that will be read under it; memory slots that none of them sees are then not made.
        out: where to write the memory, without a gradient (a view of a cache): of its shape, floating, its last dimension
        dense.
        shift_z: another latent for the embedding shift ``[batch, latent_dim]``, as in training with ``shift_kind="mlp"``;
        residual_z: draws for the output residual ``[batch, samples, latent_dim]``; both z itself by default (and no residual
        where it is one in gradient only).
        Raises LatentError for another shape or dtype of latents.
        """
        self.check_latents(z, finite=False)
        if self.config.conditional_decoder:
            labels = check_labels(annotations, z.shape[0], len(self.config.annotations))
            z = torch.cat([z, labels.to(z)], dim=-1)
        memory = shift = residual = None
        if self.projector is not None:
            # Under the other rules token i sees no slot after the i-th.
            slots = None if tokens is None or self.config.visibility == "prefix" else max(tokens, 1)
            dtype = self._compute_dtype if out is None else out.dtype
            memory = self.projector(z, dtype=dtype, seed=stream(seed, "dropout"), slots=slots, out=out)
        if self.embedding_shift is not None:
            shift = self.embedding_shift(z if shift_z is None else shift_z)
        if self.residual is not None and (residual_z is not None or not self.residual.gradient_only):
            residual = self.residual(z.unsqueeze(0) if residual_z is None else residual_z.movedim(1, 0))
        return Injection(str(self.config.visibility), memory, shift, residual)

    def check_latents(self, z: Tensor, *, finite: bool = True) -> None:
        """Raises LatentError unless z is floating, ``[batch, latent_dim]`` and (``finite``) without NaN or Inf."""
        check_latents(z, self.config.latent_dim, finite=finite)

    # The loss -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch | Sequence[Any],
        *,
        beta: float | Tensor | None = None,
        eps: Noise | None = None,
        seed: int | Tensor | None = None,
        tokens: int | None = None,
    ) -> LMVAEOutput:
        """Loss of a batch in one parallel pass.

        Args:
            batch: a Batch, or sentences.
            beta: weight of the KL; default ``model.beta``.
            eps: the posterior's noise ``[B, latent_dim]``, or that of every part by name
                (:data:`~lmvae_fast.models.latents.Noise`), for comparisons; default: drawn.
            seed: of the noise and the dropout; default: torch's generator.
            tokens: make memory for so many tokens, where several batches must have memory alike; default: for the
                batch's longest sentence.
        """
        if not isinstance(batch, Batch):
            batch = self.make_batch(self.tokenize(batch)).to(self.device)
        config, beta = self.config, self.beta if beta is None else beta
        posterior = self._posterior(batch)
        latents = draw_latents(config, posterior, batch, beta=beta, noise=eps, seed=seed)
        injection = self._injected(latents, batch, seed=shared_seed(batch.share, seed, self.device), tokens=tokens)
        options: dict[str, Any] = {
            "objective": str(config.objective),
            "length_normalize": bool(config.length_normalize),
        }
        lengths = batch.own(batch.tokens) + int(config.count_start_token)
        weights = token_weights(lengths.to(self.latent_dtype), batch.rows, fillers=batch.fillers, **options)
        read = batch.input_ids
        if config.free_running:
            read = self.greedy_inputs(batch, injection)
        elif config.token_dropout and self.training:
            read = dropped_tokens(batch, config.token_dropout, config.max_len, self.decoder.tokenizer, eps, seed)
        losses = token_losses if config.contrast else token_losses_in_pieces
        loss, nll = losses(self.decoder, batch, read, injection, weights)
        loss = loss + beta * batch.own(latents.kl).mean()
        auxiliary = self._auxiliary(batch, posterior, nll, eps, seed)
        with torch.no_grad():
            of_sentences = batch.own(segment_sum(nll.detach(), batch.cu_seqlens))
            terms = combine(of_sentences, lengths, batch.own(latents.kl).detach(), beta, **options)
        return LMVAEOutput(
            loss if auxiliary is None else loss + auxiliary,
            terms.reconstruction,
            terms.kl,
            beta,
            nll.detach(),
            batch.own(batch.tokens),
            batch.own(posterior.mu),
            batch.own(posterior.logvar),
            batch.own(latents.z),
            None if auxiliary is None else auxiliary.detach(),
        )

    def _auxiliary(
        self, batch: Batch, posterior: Posterior, nll: Tensor, eps: Noise | None, seed: int | Tensor | None
    ) -> Tensor | None:
        """What bag of words and contrast add to the loss, a scalar; None without either. nll ``[T]``, with its graph."""

        def score(latents: Latents) -> Tensor:
            injection = self._injected(latents, batch)
            return -segment_sum(
                token_losses(self.decoder, batch, batch.input_ids, injection, None)[1], batch.cu_seqlens
            )

        found = []
        if self.bag_of_words is not None:
            found.append(words_loss(self.bag_of_words, batch, posterior, eps, seed))
        if self.config.contrast:
            own = -segment_sum(nll, batch.cu_seqlens)
            found.append(told_apart_loss(score, own, self.config, batch, posterior, eps, seed))
        return torch.stack(found).sum() if found else None

    def _injected(
        self, latents: Latents, batch: Batch, *, seed: int | Tensor | None = None, tokens: int | None = None
    ) -> Injection:
        """What a step's draws add to the decoder."""
        most = max(batch.max_seqlen, tokens or 0)
        return self.inject(
            latents.z,
            batch.annotations,
            seed=seed,
            tokens=most,
            shift_z=latents.shift,
            residual_z=latents.residual,
        )

    def score(self, batch: Batch, z: Tensor) -> Tensor:
        """NLL of each sentence under given latents ``[B, latent_dim]``, teacher forced: ``[B]``, nats; differentiable in z.

        Raises ConfigError for latents with a tangent: sums over sentences have no forward-mode derivative.
        """
        if tangents(z):
            raise ConfigError(
                "score has no forward-mode derivative", value="z carries a tangent", limit="reverse mode",
                remedy="take torch.autograd.grad, a product with a vector by two of them",
            )  # fmt: skip
        injection = self.inject(z, batch.annotations, tokens=batch.max_seqlen)
        _, nll = token_losses(self.decoder, batch, batch.input_ids, injection, None)
        return segment_sum(nll, batch.cu_seqlens)

    @torch.no_grad()
    def greedy_inputs(self, batch: Batch, injection: Injection) -> Tensor:
        """Decoder inputs ``[T]`` when the decoder reads its own greedy output instead of the sentence (LangVAE)."""
        return self.free_running.inputs(self.decoder, batch, injection.detach())

    # Sentences in and out -------------------------------------------------------------------------------------------

    def tokenize(
        self, examples: Iterable[Any], on_long: str = "truncate", on_empty: str = "drop"
    ) -> TokenizedSentences:
        """Tokenise sentences (strings, or examples with labels), or prompts with responses for a model of these; see
        :mod:`~lmvae_fast.models.inputs`."""
        return inputs.tokenize(examples, self.config, self.decoder, self.encoder, on_long=on_long, on_empty=on_empty)

    def pool(self, sentences: TokenizedSentences, batch_size: int = 64, progress: Any = None) -> Tensor:
        """Pooled features of a frozen encoder, ``[N, width]`` on the CPU, float32 (float64 of a float64 model)."""
        assert isinstance(self.encoder, Encoder)  # the other kind is never frozen
        return self.encoder.pool_texts(
            sentences.spelled, sentences.lengths, batch_size=batch_size, dtype=self.latent_dtype, progress=progress
        )

    def make_batch(
        self,
        sentences: TokenizedSentences,
        rows: Sequence[int] | np.ndarray | None = None,
        pooled: Tensor | None = None,
    ) -> Batch:
        """Pack some sentences; ``pooled`` are the features of *all* sentences (``[N, width]``), or None to run the encoder."""
        return inputs.make_batch(sentences, rows, pooled, self.config, self.encoder, self.decoder)

    def decode(
        self,
        z: Tensor,
        *,
        annotations: Tensor | None = None,
        prompts: str | Sequence[Any] | None = None,
        **options: Any,
    ) -> list[str]:
        """Text of latents ``[batch, latent_dim]``; options are the fields of GenerationConfig. Greedy by default.

        prompts: one for all latents, or one for each (also as ids): what a sentence begins with, or, in a model of prompts,
        what the text answers. z is never drawn here: z = 0 is the prior's mean, ``torch.randn`` a draw from it.

        Raises LatentError for latents that do not fit or are not finite, ConfigError for bad options.
        """
        from lmvae_fast.generation.engine import (
            decode,  # the engine builds on this module: the one upward import of models
        )

        return decode(self, z, GenerationConfig.from_dict(options), annotations=annotations, prompts=prompts)

    # Saving ---------------------------------------------------------------------------------------------------------

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The parameters that train, by name (tied ones once): all that a training checkpoint needs of the model."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy such a dictionary in. Raises CheckpointError for missing, unknown or misshapen entries."""
        copy_into({name: value for name, value in self.named_parameters() if value.requires_grad}, state)

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_frozen: bool | None = None) -> None:
        """Write configuration, trained weights and a model card; see :func:`~lmvae_fast.models.serialization.save_model`."""
        stored: dict[str, Any] = {"decoder": self.decoder}
        if isinstance(self.encoder, Encoder):  # one of the decoder's layers is built anew, and all that it has trains
            stored["encoder"] = self.encoder
        save_model(folder, self.config, self.trainable_state_dict(), stored, include_frozen=include_frozen)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> LMVAE:
        """Load what :meth:`save_pretrained` wrote, from a folder or a Hugging Face hub name.

        overrides: configuration fields to change; ``train_decoder=True`` or ``decoder_part="lora"`` begin another stage of
        training. Raises what :func:`~lmvae_fast.models.serialization.read_model` raises.
        """
        stored = read_model(source, **overrides)
        with building():
            config = resolve(parts.located(stored.wanted))
            decoder = parts.load_decoder(config)
            encoder = parts.load_encoder(config, decoder)
            parts.check_sizes(config, encoder, decoder, {name: value.shape for name, value in stored.state.items()})
        model = cls(stored.wanted, encoder=encoder, decoder=decoder)
        stored.load_into(model, {"encoder": model.encoder, "decoder": model.decoder})
        return model.eval()
