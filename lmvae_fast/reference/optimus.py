"""Optimus (arXiv 2004.04092; behaviour of ChunyuanLI/Optimus), in plain eager torch.

- mu, logvar: one linear layer without bias on BERT's pooler output.
- "Memory": one linear layer without bias gives one vector per decoder layer, before all tokens, as key *and* as
  value, cut into heads, without the layer's own projections: one slot, ``prefix`` visibility, token positions from 1.
- "Embedding": another linear layer's output is added to every token's embedding.
- Teacher forcing in one causal pass. Encoder and decoder train with the rest.
- The KL of a dimension counts only when above lambda (a hard mask, off while beta is 0).
- Generation: batch 1, each token re-reads the whole prefix.

Its GPT-2 gets special tokens of its own; here the tokenizer's bos and eos do their work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lmvae_fast.errors import LatentError
from lmvae_fast.reference.text import add_prefix_space

IGNORED = -100


class OptimusLoss(NamedTuple):
    """loss: scalar. reconstruction, kl: [B], the terms that entered it (kl masked, beta not included), nats.

    nll: [B, S] per token, 0 on padding. mu, logvar, z: [B, nz].
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    nll: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor


def optimus_kl(mu: Tensor, logvar: Tensor, *, beta: float, target: float) -> Tensor:
    """KL [B] of posteriors [B, nz] to N(0, I): the dimensions whose KL exceeds ``target``; all of them at beta 0."""
    per_dim = 0.5 * (mu.square() + logvar.exp() - logvar - 1)
    if beta > 0:
        per_dim = per_dim * (per_dim > target)
    return per_dim.sum(1)


def optimus_betas(
    total_steps: int, *, cycles: int = 1, zero: float = 0.5, increase: float = 0.25, beta: float = 1.0
) -> Tensor:
    """beta of every step, fp64 [total_steps], written as a loop over the cycles.

    A cycle of P = total_steps / cycles steps is 0 for its first ``zero`` P steps, then climbs by
    ``beta / (increase P)`` a step from 0, then stays at beta. Cycle c starts at step floor(c P).
    """
    betas = torch.full((total_steps,), beta, dtype=torch.float64)
    period = total_steps / cycles
    for cycle in range(cycles):
        value, i = 0.0, 0
        while value < beta and int(i + cycle * period) < total_steps:
            betas[int(i + cycle * period)] = value
            if i + 1 >= zero * period:
                value = beta * (i + 1 - _first_climb(zero * period)) / (increase * period)
            i += 1
    return betas


def _first_climb(zeros: float) -> int:
    """Index of the first step of a cycle that is not among its ``zeros`` steps at 0."""
    return int(zeros) + (zeros > int(zeros))


class ReferenceOptimus(nn.Module):
    """Optimus, eager.

    Args:
        encoder_model, encoder_tokenizer: a Hugging Face encoder with a pooler (BERT).
        decoder_model, decoder_tokenizer: a causal LM with ordinary key/value attention (GPT-2; others by the same rule,
            the memory vector of a layer then has ``kv_heads * head_dim`` entries). The tokenizer is changed in place.
        latent_dim: nz (32 for language modelling, 768 for manipulation).
        max_len: tokens predicted, end token included; longer sentences are cut.
        memory, embedding: the two injections; both on by default.
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
        memory: bool = True,
        embedding: bool = True,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder_model, decoder_model
        self.encoder_tokenizer, self.decoder_tokenizer = encoder_tokenizer, add_prefix_space(decoder_tokenizer)
        self.latent_dim, self.max_len = latent_dim, max_len
        config = decoder_model.config.get_text_config()
        heads = config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.eos_token_id = decoder_tokenizer.eos_token_id
        bos = decoder_tokenizer.bos_token_id
        self.bos_token_id = self.eos_token_id if bos is None else bos

        self.linear = nn.Linear(encoder_model.config.hidden_size, 2 * latent_dim, bias=False)
        self.linear_memory = self.linear_embedding = None
        if memory:
            self.linear_memory = nn.Linear(latent_dim, self.layers * self.kv_heads * self.head_dim, bias=False)
        if embedding:
            self.linear_embedding = nn.Linear(latent_dim, config.hidden_size, bias=False)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """mu and logvar, each [B, nz], from the encoder's pooler output."""
        tokens = self.encoder_tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.linear.weight.device)
        out = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        mu, logvar = self.linear(out.pooler_output).chunk(2, dim=1)
        return mu, logvar

    def memory(self, z: Tensor) -> Tensor | None:
        """[L, 2, B, Hkv, 1, D] from z [B, nz]; keys and values are the same vectors. None without memory."""
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise LatentError("latent of the wrong shape", value=tuple(z.shape), limit=f"[batch, {self.latent_dim}]")
        if self.linear_memory is None:
            return None
        vectors = self.linear_memory(z).view(len(z), self.layers, self.kv_heads, 1, self.head_dim).transpose(0, 1)
        return torch.stack([vectors, vectors], dim=1)

    def logits(self, ids: Tensor, z: Tensor) -> Tensor:
        """Next-token logits [B, S, V] for ids int64 [B, S] under z [B, nz]: one causal pass over a prefilled cache.

        Padding on the right needs no mask: no real token sees it.
        """
        memory = self.memory(z)
        cache = DynamicCache()
        if memory is not None:
            for layer in range(self.layers):
                cache.update(memory[layer, 0], memory[layer, 1], layer)
        embeds = self.decoder.get_input_embeddings()(ids)
        if self.linear_embedding is not None:
            embeds = embeds + self.linear_embedding(z)[:, None]
        first = 0 if memory is None else 1
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand(len(ids), -1)
        return self.decoder(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True).logits

    def token_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Inputs (bos, t0, ..) and labels (t0, .., eos), int64 [B, S]; labels are -100 on padding."""
        rows = self.decoder_tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        labels = [[*row, self.eos_token_id][: self.max_len] for row in rows]
        longest = max(len(row) for row in labels)
        padded = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels], dtype=torch.int64)
        padded = padded.to(self.linear.weight.device)
        first = torch.full_like(padded[:, :1], self.bos_token_id)
        inputs = torch.cat([first, padded[:, :-1]], dim=1)
        return inputs.masked_fill(inputs == IGNORED, self.eos_token_id), padded

    def loss(
        self,
        texts: Sequence[str],
        *,
        beta: float,
        target_kl: float = 0.5,
        eps: Tensor | None = None,
        length_normalize: bool = False,
    ) -> OptimusLoss:
        """Mean over the batch of reconstruction + beta * KL.

        Args:
            beta: this step's weight (see :func:`optimus_betas`); target_kl: lambda, nats per dimension.
            eps: noise [B, nz] of z = mu + eps * sigma; drawn when None.
            length_normalize: divide a sentence's reconstruction by its number of predicted tokens.
        """
        mu, logvar = self.encode(texts)
        eps = torch.randn_like(mu) if eps is None else eps
        z = mu + eps * torch.exp(0.5 * logvar)
        inputs, labels = self.token_ids(texts)
        logits = self.logits(inputs, z)
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        reconstruction = nll.sum(1)
        if length_normalize:
            reconstruction = reconstruction / (labels != IGNORED).sum(1)
        kl = optimus_kl(mu, logvar, beta=beta, target=target_kl)
        return OptimusLoss((reconstruction + beta * kl).mean(), reconstruction, kl, nll, mu, logvar, z)

    @torch.no_grad()
    def generate_ids(
        self,
        z: Tensor,
        *,
        max_new_tokens: int | None = None,
        choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(dim=-1),
    ) -> list[int]:
        """Token ids after one latent z [nz] or [1, nz], up to and without eos; every step re-reads the whole prefix.

        Args:
            choose: logits [1, V] -> id [1]; greedy by default.
        """
        z = z.view(1, -1)
        ids = torch.full((1, 1), self.bos_token_id, dtype=torch.int64, device=z.device)
        for _ in range(self.max_len if max_new_tokens is None else max_new_tokens):
            chosen = choose(self.logits(ids, z)[:, -1])
            if chosen.item() == self.eos_token_id:
                break
            ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
        return ids[0, 1:].tolist()

    def generate(self, z: Tensor, **options) -> str:
        """The text of :meth:`generate_ids`."""
        return self.decoder_tokenizer.batch_decode([self.generate_ids(z, **options)], skip_special_tokens=True)[0]
