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
from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.kernels.philox import seed_tensor
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.models.batch import Batch, Share, pack
from lmvae_fast.models.decoders import Decoder
from lmvae_fast.models.encoders import Encoder, Posterior
from lmvae_fast.models.greedy import FreeRunning
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.objective import combine, kl_per_dim, kl_reduce, segment_sum
from lmvae_fast.models.projectors import LinearProjector, SharedProjector
from lmvae_fast.models.systems import resolve
from lmvae_fast.models.tokenization import TokenizedSentences, tokenize
from lmvae_fast.models.tuning import Tuning

# The dropout of the memory must not reuse the noise of the posterior when a caller gives one seed for a whole step.
_DROPOUT_STREAM = 0x5DEECE66D


@dataclass
class LMVAEOutput:
    """What one forward pass returns; B sentences, T tokens.

    ``loss`` scalar; ``reconstruction``, ``kl`` float32 ``[B]``: the terms that entered it, in nats; ``beta`` the weight of
    the KL; ``nll`` ``[T]`` per token; ``tokens`` int64 ``[B]``; ``mu``, ``logvar``, ``z`` ``[B, latent_dim]``. Only ``loss``
    is meant for backward.
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


class LMVAE(nn.Module):
    """A language-model VAE.

    Args:
        config: what to build; its open fields are filled from the system's preset (see ``model.config`` afterwards).
        encoder, decoder: the parts, when they are already in memory; loaded by the configuration's names otherwise.

    Raises:
        CheckpointError, TokenizerError, UnsupportedDecoderError, ConfigError: a part cannot be loaded or does not fit.
    """

    def __init__(self, config: LMVAEConfig, *, encoder: Encoder | None = None, decoder: Decoder | None = None):
        super().__init__()
        config = resolve(config)
        dtype = getattr(torch, config.dtype)
        if decoder is None:
            decoder = Decoder.load(
                config.decoder, dtype=dtype, train=bool(config.train_decoder), tuning=tuning_of(config),
                add_prefix_space=bool(config.add_prefix_space),
            )  # fmt: skip
        if encoder is None:
            encoder = Encoder.load(
                config.encoder, dtype=dtype, pooling=str(config.pooling), normalize=bool(config.normalize),
                train=bool(config.train_encoder),
            )  # fmt: skip
        self._check_parts(config, encoder, decoder)
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.beta: float | Tensor = 1.0
        self.free_running = FreeRunning()
        width = encoder.width + len(config.annotations)
        self.posterior_head = nn.Linear(width, 2 * config.latent_dim, bias=False)
        self.projector = self._build_projector()
        self.embedding_shift = None
        if config.embedding_shift:
            self.embedding_shift = nn.Linear(self.injected_dim, decoder.hidden_size, bias=False)
        for module in (self.posterior_head, self.projector, self.embedding_shift):
            if module is not None:
                module.to(device=decoder.device, dtype=self._master_dtype)
        decoder.check_positions(int(config.slots or 0), config.max_len, str(config.visibility))

    @property
    def injected_dim(self) -> int:
        """Width of what goes into the projector: z, and the pooled labels of a conditional decoder."""
        return self.config.latent_dim + len(self.config.annotations) * self.config.conditional_decoder

    @property
    def _master_dtype(self) -> torch.dtype:
        """Dtype of what trains: float32, or float64 for a float64 model, whatever the frozen parts are held in."""
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

    # Encoding -------------------------------------------------------------------------------------------------------

    def tokenize(self, examples: Iterable[Any], on_long: str = "truncate", on_empty: str = "drop") -> TokenizedSentences:
        """Tokenise sentences (strings, or examples with labels); see :func:`~lmvae_fast.models.tokenization.tokenize`."""
        if isinstance(examples, str):
            raise DataError("sentences must come as a list", value=repr(examples[:40]), remedy="wrap it: [text]")
        return tokenize(
            examples, self.decoder.tokenizer, max_len=self.config.max_len, vocab_size=self.decoder.vocab_size,
            labels=self.config.annotations, on_long=on_long, on_empty=on_empty,
        )  # fmt: skip

    @torch.no_grad()
    def pool(self, sentences: TokenizedSentences, batch_size: int = 64, progress: Any = None) -> Tensor:
        """Pooled features of a frozen encoder, ``[N, width]`` on the CPU, float32 (float64 of a float64 model).

        Sentences are read sorted by length, to pad little. ``progress``: called with the number of sentences done after
        every batch, if given.
        """
        order = sorted(range(len(sentences)), key=lambda row: -len(sentences.ids[row]))
        features = torch.empty(len(sentences), self.encoder.width, dtype=self._master_dtype)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = self.encoder.tokenize([sentences.spelled[row] for row in rows])
            features[rows] = self.encoder(ids.to(self.device), mask.to(self.device)).to(features)
            if progress is not None:
                progress(len(rows))
        return features

    def make_batch(
        self, sentences: TokenizedSentences, rows: Sequence[int] | np.ndarray | None = None, pooled: Tensor | None = None
    ) -> Batch:
        """Pack some sentences; ``pooled`` are the features of *all* sentences (``[N, width]``), or None to run the encoder."""
        rows = range(len(sentences)) if rows is None else rows
        bos, eos = self.decoder.tokenizer.bos_token_id, self.decoder.tokenizer.eos_token_id
        ids = [sentences.ids[row] for row in rows]
        if self.config.objective == "langvae-0.6":
            # As released: no end token, every sentence padded to the batch's longest, the padding predicted too, and the
            # tokens that equal the padding not counted.
            longest = max(map(len, ids), default=0)
            pad = eos
            labels = [sentence + [pad] * (longest - len(sentence)) for sentence in ids]
            tokens = [sum(token != pad for token in sentence) for sentence in labels]
        else:
            labels = [[*sentence, eos][: self.config.max_len] for sentence in ids]
            tokens = [len(sentence) for sentence in labels]
        inputs = [[bos, *sentence[:-1]] for sentence in labels]
        index = torch.tensor(list(rows), dtype=torch.int64)
        encoder_ids = encoder_mask = None
        if pooled is None:
            encoder_ids, encoder_mask = self.encoder.tokenize([sentences.spelled[row] for row in rows])
        return Batch(
            **pack(inputs, labels),  # type: ignore[arg-type]
            tokens=torch.tensor(tokens, dtype=torch.int64),
            indices=torch.tensor([sentences.source_rows[row] for row in rows], dtype=torch.int64),
            pooled=None if pooled is None else pooled[index],
            encoder_ids=encoder_ids,
            encoder_mask=encoder_mask,
            annotations=None if sentences.annotations is None else sentences.annotations[index],
            texts=[sentences.texts[row] for row in rows],
        )

    def encode(self, inputs: Batch | Sequence[Any]) -> Posterior:
        """Posterior of a batch; or of sentences, then without a graph, in evaluation mode and in batches of 64.

        Raises DataError for an empty sentence, and for what :func:`~lmvae_fast.models.tokenization.tokenize` refuses.
        """
        if isinstance(inputs, Batch):
            return self._posterior(inputs)
        sentences = self.tokenize(inputs, on_empty="error")
        parts = []
        with evaluating(self):
            for start in range(0, len(sentences), 64):
                rows = range(start, min(start + 64, len(sentences)))
                parts.append(self._posterior(self.make_batch(sentences, rows).to(self.device)))
        return Posterior(torch.cat([part.mu for part in parts]), torch.cat([part.logvar for part in parts]))

    def _posterior(self, batch: Batch) -> Posterior:
        pooled = batch.pooled
        if pooled is None:
            pooled = self.encoder(batch.encoder_ids, batch.encoder_mask)
        if batch.annotations is not None:
            pooled = torch.cat([pooled, batch.annotations.to(pooled.dtype)], dim=-1)
        # The posterior is float32 also under autocast: exp(logvar) does not survive 8 bits of mantissa.
        with torch.autocast(pooled.device.type, enabled=False):
            mu, logvar = self.posterior_head(pooled.to(self.posterior_head.weight.dtype)).chunk(2, dim=-1)
        return Posterior(mu, logvar)

    # Injection ------------------------------------------------------------------------------------------------------

    def inject(
        self,
        z: Tensor,
        annotations: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        tokens: int | None = None,
        out: Tensor | None = None,
    ) -> Injection:
        """What latents ``[batch, latent_dim]`` add to the decoder.

        tokens: the most tokens that will be read under it; memory slots that none of them sees are then not made.
        out: where to write the memory, without a gradient (a view of a cache): of its shape, floating, its last dimension
        dense.
        Raises LatentError for another shape or dtype of latents.
        """
        self.check_latents(z, finite=False)
        if self.config.conditional_decoder:
            if annotations is None:
                raise LatentError(
                    "a conditional decoder needs the pooled labels beside z", limit=f"[{z.shape[0]}, labels]",
                    remedy="pass annotations (model.make_batch makes them)",
                )  # fmt: skip
            if annotations.shape != (z.shape[0], len(self.config.annotations)):
                raise LatentError(
                    "pooled labels do not fit the latents", value=list(annotations.shape),
                    limit=[z.shape[0], len(self.config.annotations)],
                )  # fmt: skip
            z = torch.cat([z, annotations.to(z)], dim=-1)
        memory = shift = None
        if self.projector is not None:
            # Under the other rules token i sees no slot after the i-th.
            slots = None if tokens is None or self.config.visibility == "prefix" else max(tokens, 1)
            dtype = self._compute_dtype if out is None else out.dtype
            memory = self.projector(z, dtype=dtype, seed=_other_stream(seed), slots=slots, out=out)
        if self.embedding_shift is not None:
            shift = self.embedding_shift(z)
        return Injection(str(self.config.visibility), memory, shift)

    def check_latents(self, z: Tensor, *, finite: bool = True) -> None:
        """Raises LatentError unless z is floating, ``[batch, latent_dim]`` and (``finite``) without NaN or Inf."""
        width = self.config.latent_dim
        if not isinstance(z, Tensor):
            raise LatentError(
                "latents must be a tensor", value=type(z).__name__, limit=f"floating [batch, {width}]",
                remedy="torch.as_tensor(latents)",
            )  # fmt: skip
        if z.dim() != 2 or z.shape[1] != width or not z.is_floating_point():
            raise LatentError(
                "latents do not fit the model", value=f"{z.dtype} {list(z.shape)}", limit=f"floating [batch, {width}]",
                remedy="pass one row of latent_dim numbers per sentence",
            )  # fmt: skip
        if finite and not bool(torch.isfinite(z).all()):
            row = int((~torch.isfinite(z)).any(1).nonzero()[0])
            raise LatentError("latents contain NaN or Inf", value=f"row {row}", remedy="drop or mend that row")

    # Training -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch | Sequence[Any],
        *,
        beta: float | Tensor | None = None,
        eps: Tensor | None = None,
        seed: int | Tensor | None = None,
        tokens: int | None = None,
    ) -> LMVAEOutput:
        """Loss of a batch in one parallel pass.

        Args:
            batch: a Batch, or sentences.
            beta: weight of the KL; default ``model.beta``.
            eps: the posterior's noise ``[B, latent_dim]``, for comparisons; default: drawn.
            seed: of the noise and the dropout; default: torch's generator.
            tokens: make memory for so many tokens, where several batches must have memory alike; default: for the
                batch's longest sentence.
        """
        if not isinstance(batch, Batch):
            batch = self.make_batch(self.tokenize(batch)).to(self.device)
        beta = self.beta if beta is None else beta
        posterior = self._posterior(batch)
        z, kl = self._sample(posterior, beta, eps, seed, batch.share)
        tokens = max(batch.max_seqlen, tokens or 0)
        injection = self.inject(z, batch.annotations, seed=self._stream_of(batch.share, seed), tokens=tokens)
        loss, nll = self._token_losses(batch, injection, self._token_weights(batch))
        with torch.no_grad():
            terms = combine(
                segment_sum(nll.detach(), batch.cu_seqlens), batch.tokens, kl.detach(), beta,
                objective=str(self.config.objective), length_normalize=bool(self.config.length_normalize),
            )  # fmt: skip
        return LMVAEOutput(
            loss + beta * kl.mean(), terms.reconstruction, terms.kl, beta, nll.detach(), batch.tokens, posterior.mu,
            posterior.logvar, z,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, batch: Batch, z: Tensor) -> Tensor:
        """NLL of each sentence under given latents ``[B, latent_dim]``, teacher forced: ``[B]``, nats."""
        injection = self.inject(z, batch.annotations, tokens=batch.max_seqlen)
        _, nll = self._token_losses(batch, injection, None, free_running=False)
        return segment_sum(nll, batch.cu_seqlens)

    def _sample(
        self, posterior: Posterior, beta, eps: Tensor | None, seed, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        mode, target = str(self.config.kl_mode), float(self.config.kl_target or 0.0)
        if mode == "dim_threshold" and isinstance(beta, (int, float)) and beta == 0:
            mode = "sum"  # Optimus masks nothing while the KL has no weight
        if eps is None and share is not None:
            # Noise goes by row, so each sentence stands in its row of the whole batch; the other rows are idle.
            rows = share.rows
            places = torch.arange(rows.start, rows.stop, rows.step, device=posterior.mu.device)
            mu, logvar = (
                x.new_zeros(share.total, x.shape[1]).index_copy(0, places, x) for x in (posterior.mu, posterior.logvar)
            )
            z, kl = posterior_sample(mu, logvar, seed=seed, kl=mode, kl_target=target)
            return z[places], kl[places]
        if eps is None:
            return posterior_sample(posterior.mu, posterior.logvar, seed=seed, kl=mode, kl_target=target)
        kl = kl_reduce(kl_per_dim(posterior.mu, posterior.logvar), mode, target)
        return posterior.mu + eps * torch.exp(0.5 * posterior.logvar), kl

    def _stream_of(self, share: Share | None, seed: int | Tensor | None) -> int | Tensor | None:
        """The seed of the memory's dropout; processes that share a batch say which of its sentences they have, so that the
        masks are those of the whole batch."""
        if share is None:
            return seed
        places = torch.tensor([share.rows.start, share.rows.step, share.total], device=self.device)
        return torch.cat([seed_tensor(seed, self.device), places])

    def _token_weights(self, batch: Batch) -> Tensor:
        """How much each token's NLL counts in the loss, ``[T]``, so that one weighted sum is the reconstruction."""
        sentences = max(batch.batch_size, 1)
        tokens = batch.tokens.to(self._master_dtype)
        if self.config.objective == "langvae-0.6":
            return (tokens.sum() / sentences**2).expand(batch.num_tokens)
        weights = torch.ones_like(tokens) if not self.config.length_normalize else 1.0 / tokens.clamp_min(1)
        return (weights / sentences)[batch.rows]

    def _token_losses(
        self, batch: Batch, injection: Injection, weights: Tensor | None, free_running: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of token losses (scalar) and the NLL of each token ``[T]``."""
        free_running = bool(self.config.free_running) if free_running is None else free_running
        inputs = self.greedy_inputs(batch, injection) if free_running else batch.input_ids
        hidden = self.decoder.hidden(
            inputs, injection, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, rows=batch.rows,
            token_index=batch.token_index,
        )  # fmt: skip
        weight, bias = self.decoder.head_weight, self.decoder.head_bias
        return lm_head_loss(
            hidden.to(weight.dtype), weight, batch.labels, bias=bias, token_weights=weights, softcap=self.decoder.softcap
        )

    @torch.no_grad()
    def greedy_inputs(self, batch: Batch, injection: Injection) -> Tensor:
        """Decoder inputs ``[T]`` when the decoder reads its own greedy output instead of the sentence (LangVAE)."""
        return self.free_running.inputs(self.decoder, batch, injection.detach())

    # Decoding -------------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, *, annotations: Tensor | None = None, **options: Any) -> list[str]:
        """Text of latents ``[batch, latent_dim]``; options are the fields of GenerationConfig. Greedy by default.

        Raises LatentError for latents that do not fit or are not finite, ConfigError for bad options.
        """
        from lmvae_fast.generation.engine import generate  # it builds on this module; the one upward import of models

        if isinstance(z, Tensor) and z.dim() == 1:
            z = z.unsqueeze(0)
        self.check_latents(z, finite=False)  # generate takes iterables too, decode does not
        return [out.text for out in generate(self, z, GenerationConfig.from_dict(options), annotations=annotations)]

    # Saving ---------------------------------------------------------------------------------------------------------

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The parameters that train, by name (tied ones once): all that a training checkpoint needs of the model."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy such a dictionary in. Raises CheckpointError for missing, unknown or misshapen entries."""
        from lmvae_fast.models.serialization import copy_into

        copy_into({name: value for name, value in self.named_parameters() if value.requires_grad}, state)

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_frozen: bool | None = None) -> None:
        """Write configuration, trained weights and a model card; see ``models/serialization.py``."""
        from lmvae_fast.models.serialization import save_pretrained

        save_pretrained(self, folder, include_frozen=include_frozen)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> LMVAE:
        """Load what :meth:`save_pretrained` wrote, from a folder or a Hugging Face hub name."""
        from lmvae_fast.models.serialization import from_pretrained

        return from_pretrained(cls, source, **overrides)

    # Construction ---------------------------------------------------------------------------------------------------

    def _build_projector(self) -> nn.Module | None:
        config, decoder = self.config, self.decoder
        shape = {"layers": decoder.num_layers, "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim}
        dropout = float(config.projector_dropout or 0.0)
        if config.projector == "none":
            return None
        if config.projector == "shared":
            if config.slots != 1:
                raise ConfigError(
                    "a shared projector makes one slot per layer", value=f"slots={config.slots}", limit=1,
                    remedy="set slots=1 or projector='linear'",
                )  # fmt: skip
            return SharedProjector(self.injected_dim, dropout=dropout, **shape)
        return LinearProjector(
            self.injected_dim, slots=int(config.slots or 1), dropout=dropout, hidden=config.projector_hidden, **shape
        )

    @staticmethod
    def _check_parts(config: LMVAEConfig, encoder: Encoder, decoder: Decoder) -> None:
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            wanted = bool(getattr(config, f"train_{name}"))
            if part.trains != wanted:
                raise ConfigError(
                    f"the {name} given and the configuration disagree about training it",
                    value=f"{name}.trains={part.trains}, train_{name}={wanted}", remedy="make them equal",
                )  # fmt: skip
        if decoder.trains and decoder.tuning != tuning_of(config):
            raise ConfigError(
                "the decoder given and the configuration disagree about what of it trains", value=str(decoder.tuning),
                limit=str(tuning_of(config)), remedy="give Decoder the configuration's tuning",
            )  # fmt: skip
        for name in ("pooling", "normalize"):
            if getattr(encoder, name) != getattr(config, name):
                raise ConfigError(
                    f"the encoder given and the configuration disagree about {name}",
                    value=f"encoder.{name}={getattr(encoder, name)!r}, {name}={getattr(config, name)!r}",
                    remedy="make them equal",
                )
        if config.projector == "none" and config.visibility != "prefix":
            raise ConfigError(
                f"{config.visibility} visibility is about memory slots, and projector='none' makes none",
                remedy="set visibility='prefix'",
            )


def tuning_of(config: LMVAEConfig) -> Tuning:
    """What of the decoder trains, by a configuration."""
    return Tuning(config.decoder_part, config.lora_rank, config.lora_alpha)


def _other_stream(seed: int | Tensor | None) -> int | Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        return torch.cat([seed[:1] ^ _DROPOUT_STREAM, seed[1:]])
    return seed ^ _DROPOUT_STREAM
