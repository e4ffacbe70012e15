"""LangVAE 0.6.13 as released, in plain eager torch on current transformers.

Facts from arXiv 2505.00004 and the behaviour of the package (neuro-symbolic-ai/LangVAE), written anew. It does this:

- A frozen encoder reads the sentence's text (decoded from the decoder's token ids), its states are pooled and detached,
  one linear layer gives mu and logvar.
- Per decoder layer one linear layer turns z into keys and values of ``max_len + 1`` slots, with dropout 0.1.
- The frozen decoder is read one token at a time, in training too on its own greedy choices, ``rolling`` visibility.
- The loss multiplies each sentence's token count with the batch's *total* negative log-likelihood, padding included: a
  slip in the order of reduction. ``objective="elbo"`` is the loss that was meant: the NLL of the sentence's own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmvae_fast.config import OBJECTIVES
from lmvae_fast.errors import ConfigError, LatentError
from lmvae_fast.reference.stepwise import StepwiseDecoder
from lmvae_fast.reference.text import add_prefix_space


class LangVAELoss(NamedTuple):
    """Means over the batch as LangVAE reports them (``kl`` includes beta and the threshold), and what they came from.

    loss, reconstruction, kl: scalars. probabilities [B, S, V]; mu, logvar, z [B, nz]; target_ids int64 [B, S].
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    probabilities: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    target_ids: Tensor


def langvae_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Sets a decoder's tokenizer up as LangVAE does: a space before the first word, and eos as padding."""
    add_prefix_space(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Sentence vectors [B, h] from encoder states [B, S, h] and mask [B, S]: ``mean``, ``cls`` or ``last``."""
    if how == "mean":
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if how == "cls":
        return states[:, 0]
    if how == "last":  # the last real token, on whichever side the padding is
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
    raise ConfigError("unknown pooling", value=how, limit="mean, cls, last")


def pool_annotations(labels: Tensor) -> Tensor:
    """Label vectors [B, A] from one-hot labels [B, S, A] (all-zero rows are padding): later tokens weigh more."""
    weights = torch.linspace(0.1, 1.0, labels.shape[1], device=labels.device)
    return torch.einsum("s,bsa->ba", weights, labels.to(weights.dtype)) / labels.shape[1]


def langvae_loss(
    probabilities: Tensor,
    target_ids: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    pad_token_id: int,
    beta: float,
    target_kl: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, reconstruction and KL (scalars) of LangVAE.

    Args:
        probabilities: [B, S, V], after softmax; target_ids: int64 [B, S]; mu, logvar: [B, nz].
        target_kl: a sentence whose KL (in nats, summed over dimensions) is not above this contributes no KL.
        objective: ``langvae-0.6`` (as released) or ``elbo`` (as meant).
    """
    if objective not in OBJECTIVES:
        raise ConfigError("unknown objective", value=objective, limit=", ".join(OBJECTIVES))
    floor = torch.finfo(probabilities.dtype).tiny * 10
    log_probabilities = probabilities.clamp_min(floor).log()
    nll = -log_probabilities.gather(2, target_ids.unsqueeze(2)).squeeze(2)
    mask = (target_ids != pad_token_id).to(nll.dtype)
    if objective == "langvae-0.6":
        reconstruction = nll.sum() * mask.sum(1) / len(nll)
    else:
        reconstruction = (nll * mask).sum(1)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    kl = beta * torch.where(kl > target_kl, kl, 0.0)
    return (reconstruction + kl).mean(), reconstruction.mean(), kl.mean()


class ReferenceLangVAE(nn.Module):
    """LangVAE, sequential and eager. ``train()`` switches its dropout alone: encoder and decoder stay frozen in eval.

    Args:
        encoder_model, encoder_tokenizer: a Hugging Face text encoder.
        decoder_model, decoder_tokenizer: a causal LM with ordinary key/value attention. The tokenizer is changed in
            place by :func:`langvae_tokenizer`.
        latent_dim: nz.
        max_len: tokens generated; the memory has ``max_len + 1`` slots, of which the last is never seen.
        pooling: ``mean``, ``cls`` or ``last``; normalize: L2-normalise the pooled vector.
        annotation_size: A, width of the pooled label vector that the posterior head also reads; 0 for none.
        conditional: concatenate that vector to z before the projector, too.
        dropout: on the projected memory, in training.
    """

    def __init__(
        self,
        encoder_model: PreTrainedModel,
        encoder_tokenizer: PreTrainedTokenizerBase,
        decoder_model: PreTrainedModel,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        latent_dim: int,
        max_len: int,
        pooling: str = "mean",
        normalize: bool = False,
        annotation_size: int = 0,
        conditional: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.encoder = encoder_model.eval().requires_grad_(False)
        self.decoder = decoder_model.eval().requires_grad_(False)
        self.encoder_tokenizer, self.decoder_tokenizer = encoder_tokenizer, langvae_tokenizer(decoder_tokenizer)
        self.latent_dim, self.max_len, self.dropout = latent_dim, max_len, dropout
        self.pooling, self.normalize, self.conditional = pooling, normalize, conditional

        config = decoder_model.config.get_text_config()
        heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.pad_token_id = decoder_tokenizer.eos_token_id
        bos = decoder_tokenizer.bos_token_id
        self.bos_token_id = config.bos_token_id if bos is None else bos

        width = 2 * self.kv_heads * (max_len + 1) * self.head_dim
        nz_in = latent_dim + (annotation_size if conditional else 0)
        dtype = decoder_model.dtype
        self.linear = nn.Linear(encoder_model.config.hidden_size + annotation_size, 2 * latent_dim, bias=False)
        self.context_hidden = nn.ModuleList(
            nn.Linear(nz_in, width, dtype=dtype) for _ in range(config.num_hidden_layers)
        )

    def train(self, mode: bool = True) -> ReferenceLangVAE:
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def load_langvae_state(self, encoder_state: Mapping[str, Tensor], decoder_state: Mapping[str, Tensor]) -> None:
        """Takes the two state dictionaries of a LangVAE checkpoint (``linear.weight``; ``context_hidden.<l>.*``)."""
        self.linear.load_state_dict({key.removeprefix("linear."): value for key, value in encoder_state.items()})
        self.context_hidden.load_state_dict(
            {key.removeprefix("context_hidden."): value for key, value in decoder_state.items()}
        )

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    def target_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 [B, S], at most ``max_len`` a sentence, padded with eos; no eos of their own."""
        ids = self.decoder_tokenizer(list(texts), truncation=True, max_length=self.max_len)["input_ids"]
        longest = max(len(row) for row in ids)
        padded = [row + [self.pad_token_id] * (longest - len(row)) for row in ids]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def pooled(self, target_ids: Tensor) -> Tensor:
        """Pooled encoder features [B, h] of the text that the decoder's token ids stand for."""
        texts = self.decoder_tokenizer.batch_decode(
            [row[row != self.pad_token_id] for row in target_ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        tokens = self.encoder_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        states = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        vectors = pool(states.last_hidden_state, tokens["attention_mask"], self.pooling)
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors

    def encode(self, texts: Sequence[str] | Tensor, annotations: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu and logvar, each [B, nz], of texts (or target ids [B, S]); annotations: pooled labels [B, A] or None."""
        ids = texts if isinstance(texts, Tensor) else self.target_ids(texts)
        features = self.pooled(ids)
        if annotations is not None:
            features = torch.cat([features, annotations.to(features)], dim=1)
        mu, logvar = self.linear(features).chunk(2, dim=1)
        return mu, logvar

    def memory(self, z: Tensor, annotations: Tensor | None = None) -> Tensor:
        """Keys and values [L, 2, B, Hkv, max_len + 1, D] from z [B, nz]."""
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise LatentError("latent of the wrong shape", value=tuple(z.shape), limit=f"[batch, {self.latent_dim}]")
        if self.conditional and annotations is not None:
            z = torch.cat([z, annotations.to(z)], dim=1)
        shape = (len(z), 2, self.kv_heads, self.max_len + 1, self.head_dim)
        layers = [
            nn.functional.dropout(layer(z.to(self.decoder.dtype)), self.dropout, self.training).view(shape)
            for layer in self.context_hidden
        ]
        return torch.stack(layers).transpose(1, 2)

    def decode_probabilities(
        self, z: Tensor, steps: int | None = None, *, known_ids: Tensor | None = None, annotations: Tensor | None = None
    ) -> Tensor:
        """Next-token probabilities [B, steps, V] from z [B, nz], reading one token at a time.

        Args:
            steps: default ``max_len``. Nothing stops at eos.
            known_ids: int64 [B, steps]; what is read in place of the greedy choices (teacher forcing; not in LangVAE).
        """
        steps = self.max_len if steps is None else steps
        decoder = StepwiseDecoder(self.decoder, self.memory(z, annotations), visibility="rolling")
        current = torch.full((len(z),), self.bos_token_id, dtype=torch.int64, device=z.device)
        probabilities = []
        for step in range(steps):
            probabilities.append(decoder.step(current).softmax(dim=-1))
            current = probabilities[-1].argmax(dim=-1) if known_ids is None else known_ids[:, step]
        return torch.stack(probabilities, dim=1)

    def loss(
        self,
        texts: Sequence[str] | Tensor,
        *,
        beta: float,
        target_kl: float = 2.0,
        objective: str = "langvae-0.6",
        eps: Tensor | None = None,
        annotations: Tensor | None = None,
        teacher_forcing: bool = False,
    ) -> LangVAELoss:
        """One training forward: encode, sample z = mu + eps * sigma, decode as many steps as the longest sentence.

        Args:
            texts: sentences, or target ids int64 [B, S] padded with the eos id.
            beta: weight of the KL; target_kl: per-sentence threshold in nats.
            eps: noise [B, nz]; drawn when None.
            teacher_forcing: read the known tokens, not the greedy ones (not LangVAE; the usual way to train a VAE).
        """
        ids = texts if isinstance(texts, Tensor) else self.target_ids(texts)
        mu, logvar = self.encode(ids, annotations)
        eps = torch.randn_like(mu) if eps is None else eps
        z = mu + eps * torch.exp(0.5 * logvar)
        known = ids if teacher_forcing else None
        probabilities = self.decode_probabilities(z, ids.shape[1], known_ids=known, annotations=annotations)
        terms = langvae_loss(
            probabilities,
            ids,
            mu,
            logvar,
            pad_token_id=self.pad_token_id,
            beta=beta,
            target_kl=target_kl,
            objective=objective,
        )
        return LangVAELoss(*terms, probabilities, mu, logvar, z, ids)

    @torch.no_grad()
    def decode_ids(self, z: Tensor, steps: int | None = None) -> Tensor:
        """Greedy token ids int64 [B, steps] (default ``max_len``)."""
        return self.decode_probabilities(z, steps).argmax(dim=-1)

    def decode(self, z: Tensor) -> list[str]:
        """Greedy sentences as LangVAE prints them: all ``max_len`` tokens, special ones left out."""
        return self.decoder_tokenizer.batch_decode(self.decode_ids(z), skip_special_tokens=True)
