"""The CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE), in plain eager torch.

- A decoder-layer encoder reads prompt and response and gives mu and logvar from learned queries.
- z becomes P slots before all tokens in every layer, through a small network and the layer's own K and V projections.
- N responses of one prompt form a batch. The penalty compares the aggregate of their posteriors with the prior (DG-VAE),
  or each posterior (all others), by name in :data:`~lmvae_fast.reference.cvae_objective.PENALTIES`.
- G-Skip adds a function of fresh samples to the last hidden state, in gradient only; Skip adds its value too.
- One teacher-forced pass over padded rows, dense densities, logits of every token at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError, ConfigError, LatentError
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.reference.cvae_gpt2 import GPT2Encoder, GPT2LatentDecoder
from lmvae_fast.reference.cvae_objective import RAMPS, anneal_weight, mutual_information, penalty, sample
from lmvae_fast.reference.cvae_parts import CVAESettings, LlamaEncoder, LlamaLatentDecoder
from lmvae_fast.reference.cvae_text import IGNORED, CVAEBatch, PromptAndResponse, collate
from lmvae_fast.tensor_files import read_tensors

SAMPLES = {"z": 1, "emb": 1, "skip": 32, "kl": 16, "mi": 16}


@dataclass(frozen=True)
class CVAENoise:
    """Standard normal noise of one forward pass, each [B, nz, n]; what is None is drawn.

    z: of the memory's latent (n 1). emb: of the embedding's own (n 1). skip: of (G-)Skip (n 32). kl: of the density gap
    (n 16). mi: of the mutual information (n 16). bow: of the bag of words, one sample per label position (n S).
    """

    z: Tensor | None = None
    emb: Tensor | None = None
    skip: Tensor | None = None
    kl: Tensor | None = None
    mi: Tensor | None = None
    bow: Tensor | None = None

    @classmethod
    def of(cls, noise: CVAENoise | Mapping[str, Tensor] | None) -> CVAENoise:
        """From a mapping with these names; ``decode_z`` is another name of z, and ``eps.`` may stand before a name."""
        if noise is None or isinstance(noise, CVAENoise):
            return noise or cls()
        named = {name.removeprefix("eps.").replace("decode_z", "z"): value for name, value in noise.items()}
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in named.items() if name in known})

    def get(self, name: str, mu: Tensor, samples: int) -> Tensor:
        """The noise of one part, [B, nz, samples]."""
        given = getattr(self, name)
        if given is None:
            return torch.randn(*mu.shape, samples, dtype=mu.dtype, device=mu.device)
        if given.shape[:2] != mu.shape or (name == "bow" and given.shape[2] != samples):
            raise LatentError(f"noise {name!r} does not fit", value=tuple(given.shape), limit=[*mu.shape, samples])
        return given.to(mu)


class CVAELoss(NamedTuple):
    """loss = loss_lm + loss_kl (+ loss_contrast), scalars in nats; loss_kl holds the bag of words too, where there is one.

    nll [B]: of every response, summed over its tokens. mutual_information: scalar, not part of the loss. logits [B, S, V].
    residual [B, H]: what was added to the last hidden state; embedding [B, H]: to every token embedding; else None.
    """

    loss: Tensor
    loss_lm: Tensor
    loss_kl: Tensor
    loss_contrast: Tensor
    nll: Tensor
    mutual_information: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    logits: Tensor
    residual: Tensor | None
    embedding: Tensor | None


class ReferenceCVAE(nn.Module):
    """The CVAE, eager. Made in eval mode: the public code's Llama has no dropout, its GPT-2 has.

    Args:
        decoder: a fine-tuned Llama or GPT-2 causal LM; becomes part of the model.
        tokenizer: its tokenizer; None if only ids are given.
        settings: what to build; every new part begins as the public code's does.
        max_prompt, max_response: tokens kept of either, begin-of-text and end-of-text included.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: CVAESettings | None = None,
        *,
        max_prompt: int = 256,
        max_response: int = 36,
    ):
        super().__init__()
        settings = settings or CVAESettings()
        self.settings, self.tokenizer, self.config = settings, tokenizer, decoder.config
        self.max_prompt, self.max_response = max_prompt, max_response
        self.latent_encoder: nn.Module
        self.latent_decoder: Any
        if decoder.config.model_type == "gpt2":
            self.latent_encoder = GPT2Encoder(decoder, settings)
            self.latent_decoder = GPT2LatentDecoder(decoder, settings)
        else:
            if settings.contrast:
                raise ConfigError("contrast belongs to the GPT-2 form of the CVAE", value=decoder.config.model_type)
            self.latent_decoder = LlamaLatentDecoder(decoder, settings)
            self.latent_encoder = LlamaEncoder(decoder, settings)
            if settings.stage == 2:
                self.latent_encoder.embed_tokens.requires_grad_(False)
        if settings.bag_of_words:
            hidden, head = (
                decoder.config.hidden_size,
                nn.Linear(decoder.config.hidden_size, decoder.config.vocab_size, False),
            )
            with torch.no_grad():
                head.weight.copy_(self.latent_decoder.lm_head.weight)
            self.z2logits = nn.Sequential(nn.Linear(settings.latent_dim, hidden), nn.SiLU(), head)
        self.latent_decoder.freeze(settings.stage)
        self.calls = 0  # forward passes so far, which the annealed penalties go by
        self.anneal_train, self.anneal_evaluation = 1000, 0
        self.eval()

    # Parts ------------------------------------------------------------------------------------------------------------

    def batch(self, items: Sequence[PromptAndResponse]) -> CVAEBatch:
        """Responses of one prompt, tokenised and padded as the public code does."""
        if self.tokenizer is None:
            raise ConfigError("texts need a tokenizer", remedy="give one, or call with a CVAEBatch")
        device = self.latent_decoder.lm_head.weight.device
        made = collate(items, self.tokenizer, max_prompt=self.max_prompt, max_response=self.max_response)
        return made.to(device)

    def encode(self, batch: CVAEBatch | Sequence[PromptAndResponse]) -> tuple[Tensor, Tensor]:
        """mu and logvar, each [B, nz]."""
        batch = batch if isinstance(batch, CVAEBatch) else self.batch(batch)
        return self.latent_encoder(batch.encoder_ids, batch.encoder_mask)

    def memory(self, z: Tensor) -> Tensor:
        """[L, 2, B, Hkv, P, d] from z [B, nz]: keys (turned to positions 0..P-1 in Llama) and values."""
        if z.dim() != 2 or z.shape[1] != self.settings.latent_dim:
            raise LatentError(
                "latent of the wrong shape", value=tuple(z.shape), limit=f"[batch, {self.settings.latent_dim}]"
            )
        return self.latent_decoder.memory(z)

    def residual(self, zs: Tensor) -> Tensor | None:
        """What Skip or G-Skip adds to the last hidden state, [B, H], from samples zs [B, n, nz]; None without either."""
        if not (self.settings.skip or self.settings.gskip):
            return None
        mean = self.latent_decoder.skip(zs).mean(1)
        return mean - mean.detach() if self.settings.gskip else mean

    def embedding(self, z: Tensor) -> Tensor | None:
        """What is added to every token embedding, [B, H], from z [B, nz]; None but in the EMB types."""
        return self.latent_decoder.z2emb(z) if self.settings.embedded else None

    def hidden(
        self,
        ids: Tensor,
        cache: DynamicCache,
        positions: Tensor,
        *,
        mask: Tensor | None = None,
        embedding: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, [B, S, H], after ids int64 [B, S] at the given positions over a cache.

        mask: [B, cache + S], 0 where nothing may look; None for no padding or padding on the right.
        """
        embeds = self.latent_decoder.embed(ids)
        if embedding is not None:
            embeds = embeds + embedding[:, None]
        body = self.latent_decoder.body
        out = body(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        states = out.last_hidden_state
        return states if residual is None else states + residual[:, None]

    def cache(self, memory: Tensor) -> DynamicCache:
        """A cache that begins with the memory [L, 2, B, Hkv, P, d]."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(memory):
            cache.update(keys, values, layer)
        return cache

    # Training ---------------------------------------------------------------------------------------------------------

    def loss(
        self,
        batch: CVAEBatch | Sequence[PromptAndResponse],
        noise: CVAENoise | Mapping[str, Tensor] | None = None,
    ) -> CVAELoss:
        """The objective of N responses of one prompt.

        An annealed penalty's weight counts the calls of this method, as the public code counts its forward passes.
        """
        batch = batch if isinstance(batch, CVAEBatch) else self.batch(batch)
        noise = CVAENoise.of(noise)
        mu, logvar = self.encode(batch)
        embedding = None
        if self.settings.embedded:
            embedding = self.embedding(sample(mu, logvar, noise.get("emb", mu, 1))[:, 0])
        z, residual, logits = self._decode(batch, mu, logvar, noise, embedding)
        nll = _nll(logits, batch.labels)
        kl = penalty(self.settings.vae_type, mu, logvar, noise.get("kl", mu, SAMPLES["kl"]), weight=self._anneal())
        if self.settings.bag_of_words:
            kl = kl + self._bag_of_words(batch.labels, sample(mu, logvar, noise.get("bow", mu, batch.labels.shape[1])))
        contrast = self._contrast(batch, nll, mu, logvar, noise) if self.settings.contrast else torch.zeros_like(kl)
        with torch.no_grad():
            information = mutual_information(mu, logvar, noise.get("mi", mu, SAMPLES["mi"]))
        loss = nll.mean() + kl + contrast
        return CVAELoss(loss, nll.mean(), kl, contrast, nll, information, mu, logvar, z, logits, residual, embedding)

    def _decode(
        self, batch: CVAEBatch, mu: Tensor, logvar: Tensor, noise: CVAENoise, embedding: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B, nz], residual [B, H] and logits [B, S, V] of the batch under these posteriors: one decoder pass."""
        z = sample(mu, logvar, noise.get("z", mu, 1))[:, 0]
        residual = None
        if self.settings.skip or self.settings.gskip:
            residual = self.residual(sample(mu, logvar, noise.get("skip", mu, SAMPLES["skip"])))
        first, length = self.settings.slots, batch.input_ids.shape[1]
        positions = torch.arange(first, first + length, device=z.device).expand(len(z), -1)
        cache = self.cache(self.memory(z))
        states = self.hidden(batch.input_ids, cache, positions, embedding=embedding, residual=residual)
        return z, residual, self.latent_decoder.lm_head(states)

    def _anneal(self) -> float:
        self.calls += 1
        if self.settings.vae_type not in RAMPS:
            return 1.0
        rise, full = RAMPS[self.settings.vae_type]
        return anneal_weight(
            self.calls, rise=rise, full=full, train=self.anneal_train, evaluation=self.anneal_evaluation
        )

    def _bag_of_words(self, labels: Tensor, zs: Tensor) -> Tensor:
        """Cross-entropy of the label after each position under that position's own sample, mean over the labels."""
        logits = self.z2logits(zs[:, :-1])
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED)

    def _contrast(self, batch: CVAEBatch, nll: Tensor, mu: Tensor, logvar: Tensor, noise: CVAENoise) -> Tensor:
        """Cross-entropy of telling every response's own posterior from the others by its likelihood: N - 1 more passes."""
        each = [nll]
        for turn in range(1, len(mu)):
            logits = self._decode(batch, mu.roll(turn, 0), logvar.roll(turn, 0), noise)[2]
            each.append(_nll(logits, batch.labels))
        scores = -torch.stack(each, dim=1)
        return nn.functional.cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.int64))

    # Generation -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_ids(
        self,
        prompt_ids: Tensor,
        z: Tensor,
        *,
        mask: Tensor | None = None,
        z_embedding: Tensor | None = None,
        z_skip: Tensor | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 2,
    ) -> Tensor:
        """Greedy answers, int64 [B, S + new]: the prompts and what follows, end-of-text after an answer's end.

        Args:
            prompt_ids: int64 [B, S] or [1, S] for all latents; mask [B, S]: 0 on padding, which stands left. Padding takes
                no position: the memory is at 0..P-1 and the first real token at P.
            z: latents [B, nz]; there is no default: the public code's unset sampling is z = 0, which must be asked for.
            z_embedding: latents of the embedding [B, nz] (an independent draw in the public code); z itself if None.
            z_skip: samples of Skip [B, n, nz]; z itself if None. G-Skip adds nothing.
        """
        settings, end = self.settings, self.config.eos_token_id
        ids = prompt_ids.expand(len(z), -1)
        mask = torch.ones_like(ids) if mask is None else mask
        embedding = self.embedding(z if z_embedding is None else z_embedding)
        residual = None
        if settings.skip and not settings.gskip:
            residual = self.residual(z[:, None] if z_skip is None else z_skip)
        cache = self.cache(self.memory(z))
        seen = torch.cat([mask.new_ones(len(z), settings.slots), mask], dim=1)
        new, done = ids, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for step in range(self.max_response if max_new_tokens is None else max_new_tokens):
            positions = (seen.cumsum(1) - 1)[:, -new.shape[1] :].clamp(min=0)
            states = self.hidden(new, cache, positions, mask=seen, embedding=embedding, residual=residual)
            logits = self.latent_decoder.lm_head(states[:, -1])
            if step < min_new_tokens:
                logits[:, end] = -torch.inf
            new = logits.argmax(1, keepdim=True).masked_fill(done[:, None], end)
            ids, seen = torch.cat([ids, new], dim=1), torch.cat([seen, torch.ones_like(new)], dim=1)
            done |= new[:, 0] == end
            if bool(done.all()):
                break
        return ids


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every row's labels [B], summed over its tokens."""
    each = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return each.sum(1)


# Field of the settings <- key of the public code's config.json, of either form.
_KEYS = {
    "latent_dim": "dim_z", "queries": "num_q", "slots": "num_p", "encoder_layers": "num_latent_encoder_layers",
    "vae_type": "vae_type", "skip": "add_skip_connection", "gskip": "add_gskip_connection", "stage": "frozen_stage",
}  # fmt: skip


def read_settings(config: Mapping[str, Any], **changes: Any) -> CVAESettings:
    """The settings that a config.json of the public code names, with some of them changed."""
    given = {field: config[key] for field, key in _KEYS.items() if key in config}
    if config.get("model_type") == "gpt2":
        given["gskip"] = config.get("add_ghost_skip_connection", 0)
        given["stage"] = int(bool(config.get("frozen_pretrained", 1)))
        given["contrast"] = bool(config.get("add_contra_loss", 1))
    known = [field.name for field in fields(CVAESettings)]
    if unknown := sorted(set(changes) - set(known)):
        raise ConfigError("unknown settings", value=", ".join(unknown), limit=", ".join(known), remedy="leave them out")
    return CVAESettings(**{**given, **changes})


def load_checkpoint(
    folder: str | Path,
    *,
    base_model: str | Path,
    padding: str = "masked",
    extra: str | Path | None = None,
    max_prompt: int = 256,
    max_response: int = 36,
    **settings: Any,
) -> ReferenceCVAE:
    """A CVAE from a folder that the public code saved.

    Args:
        folder: holds config.json and model.safetensors with ``latent_encoder.*`` and ``latent_decoder.*``.
        base_model: name or folder of the decoder, for its kind and its tokenizer; its weights are the checkpoint's.
        padding: of the Llama encoder, ``masked`` or ``released``.
        extra: a folder with extra.safetensors: the parameters that only another variant has.
        settings: fields of :class:`~lmvae_fast.reference.cvae_parts.CVAESettings` that differ from the folder's.
    Raises:
        CheckpointError: the folder cannot be read, or does not hold exactly this model's parameters.
    """
    folder = Path(folder)
    config = read_object(folder / "config.json", error=CheckpointError)
    state = read_tensors(folder / "model.safetensors")
    if extra is not None:
        state.update(read_tensors(Path(extra) / "extra.safetensors"))
    decoder = load_pretrained(AutoModelForCausalLM, str(base_model), "decoder", trust_remote_code=False)
    tokenizer = load_pretrained(AutoTokenizer, str(base_model), "decoder's tokenizer", trust_remote_code=False)
    model = ReferenceCVAE(
        decoder, tokenizer, read_settings(config, padding=padding, **settings),
        max_prompt=max_prompt, max_response=max_response,
    )  # fmt: skip
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and angles that old files carry
    state = {name: value for name, value in state.items() if not name.endswith(buffers)}
    if not (model.settings.skip or model.settings.gskip):
        state = {name: value for name, value in state.items() if not name.startswith("latent_decoder.skip_connection.")}
    found = model.load_state_dict(state, strict=False)
    foreign = found.unexpected_keys
    if found.missing_keys or foreign:
        raise CheckpointError(
            f"{folder} does not hold this model's parameters",
            value=f"{len(found.missing_keys)} missing {found.missing_keys[:3]}, {len(foreign)} foreign {foreign[:3]}",
            remedy="take the base model and the settings that the checkpoint was trained with",
        )
    return model
