"""LlaMaVAE (arXiv 2312.13208), in plain eager torch. What is not published is chosen as docs/systems/llamavae.md says.

- The frozen sentence-T5's chain: mean over the mask -> Linear without bias -> L2 norm; then mu, logvar by one linear layer.
- Memory of one slot per layer: one linear layer without bias gives the vector that is both key and value (``shared``), or
  Linear, GELU, Linear gives a key and a value of their own (``mlp``). No embedding shift, token positions from 1.
- The decoder's hidden layers are frozen; its token embedding and head train.
- Loss, KL mask and decoding are Optimus's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmvae_fast.reference.optimus import OptimusLoss, ReferenceOptimus


class ReferenceLlamaVAE(ReferenceOptimus):
    """LlaMaVAE, eager.

    Args:
        encoder_model, encoder_tokenizer: the encoder of a T5.
        dense: the sentence vector's Linear(width, width', no bias), or None.
        decoder_model, decoder_tokenizer: a causal LM; the tokenizer is changed in place.
        latent_dim, max_len: as of ReferenceOptimus.
        hidden: width of the ``mlp`` memory's hidden layer; None for the ``shared`` memory.
    """

    def __init__(
        self,
        encoder_model: PreTrainedModel,
        encoder_tokenizer: PreTrainedTokenizerBase,
        dense: nn.Linear | None,
        decoder_model: PreTrainedModel,
        decoder_tokenizer: PreTrainedTokenizerBase,
        *,
        latent_dim: int,
        max_len: int,
        hidden: int | None = None,
    ):
        super().__init__(
            encoder_model, encoder_tokenizer, decoder_model, decoder_tokenizer, latent_dim=latent_dim, max_len=max_len,
            memory=hidden is None, embedding=False,
        )  # fmt: skip
        self.dense = dense
        width = encoder_model.config.hidden_size if dense is None else dense.out_features
        self.linear = nn.Linear(width, 2 * latent_dim, bias=False)
        self.mlp_memory = None
        if hidden is not None:
            entries = self.layers * 2 * self.kv_heads * self.head_dim
            self.mlp_memory = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, entries))
        self.requires_grad_(False)
        trained: list[nn.Module | None] = [self.linear, self.linear_memory, self.mlp_memory]
        trained += [decoder_model.get_input_embeddings(), decoder_model.get_output_embeddings()]
        for module in trained:
            if module is not None:
                module.requires_grad_(True)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """mu and logvar, each [B, nz]."""
        tokens = self.encoder_tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.linear.weight.device)
        with torch.no_grad():
            out = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            mask = tokens["attention_mask"].unsqueeze(-1).to(out.last_hidden_state.dtype)
            vector = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
            vector = vector if self.dense is None else self.dense(vector)
            vector = vector / vector.norm(dim=1, keepdim=True)
        mu, logvar = self.linear(vector).chunk(2, dim=1)
        return mu, logvar

    def memory(self, z: Tensor) -> Tensor | None:
        """[L, 2, B, Hkv, 1, D] from z [B, nz]."""
        if self.mlp_memory is None:
            return super().memory(z)
        vectors = self.mlp_memory(z).view(len(z), self.layers, 2, self.kv_heads, 1, self.head_dim)
        return vectors.permute(1, 2, 0, 3, 4, 5)

    def loss(self, texts: Sequence[str], *, beta: float, target_kl: float = 1.0, **options) -> OptimusLoss:
        """As of ReferenceOptimus, with a KL threshold of 1 nat per dimension."""
        return super().loss(texts, beta=beta, target_kl=target_kl, **options)
