"""A VAE of a few hundred parameters with the surface that training uses of LMVAE: tests of the loop in milliseconds.

It is a real VAE (a linear posterior over frozen features, noise, dropout, a linear decoder over a vocabulary), so that
its loss falls and each source of randomness matters.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from lmvae_fast.errors import CheckpointError, DataError
from lmvae_fast.models.objective import combine, kl_per_dim, segment_sum
from lmvae_fast.text.batch import Batch, pack
from lmvae_fast.text.tokenizer import TokenizedSentences

VOCABULARY, FEATURES, LATENT = 50, 6, 4


class Config(SimpleNamespace):
    def to_dict(self):
        return dict(vars(self))


class Tokenizer:
    """Words to ids by hash; the two methods of a Hugging Face tokenizer that the feature cache reads."""

    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_vocab(self):
        return {str(i): i for i in range(VOCABULARY)}


class FakeModel(nn.Module):
    def __init__(
        self,
        *,
        dropout: float = 0.1,
        noise: bool = True,
        seed: int = 0,
        encoder_seed: int = 0,
        train_encoder: bool = False,
    ):
        super().__init__()
        self.config = Config(latent_dim=LATENT, max_len=8, annotations=[], train_encoder=train_encoder, dropout=dropout)
        self.beta, self.noise = 1.0, noise
        self.free_running = SimpleNamespace(rest=0)
        self.pool_calls = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(encoder_seed)
            self.table = nn.Embedding(VOCABULARY, FEATURES).requires_grad_(train_encoder)
            torch.manual_seed(seed)
            self.posterior_head = nn.Linear(FEATURES, 2 * LATENT)
            self.dropout = nn.Dropout(dropout)
            self.output = nn.Linear(LATENT, VOCABULARY)
        tokenizer = Tokenizer()
        self.encoder = SimpleNamespace(tokenizer=tokenizer, width=FEATURES, fingerprint=self._encoder_fingerprint)
        self.decoder = nn.Module()  # of no parameters
        self.decoder.tokenizer, self.decoder.vocab_size = SimpleNamespace(tokenizer=tokenizer), VOCABULARY

    def _encoder_fingerprint(self) -> str:
        return hashlib.sha256(self.table.weight.detach().numpy().tobytes()).hexdigest()

    def tokenize(self, examples, on_long="truncate"):
        texts, ids, rows = [], [], []
        for row, text in enumerate(examples):
            if on_long == "drop" and len(text.split()) > self.config.max_len:
                continue
            words = text.split()[: self.config.max_len]
            texts.append(" ".join(words))
            ids.append([1 + hashlib.sha256(word.encode()).digest()[0] % (VOCABULARY - 1) for word in words])
            rows.append(row)
        if not texts:
            raise DataError("there are no sentences")
        return TokenizedSentences(
            texts=texts, spelled=texts, ids=ids, annotations=None, source_rows=rows, report={"kept": len(texts)}
        )

    @torch.no_grad()
    def pool(self, sentences, batch_size=64):
        self.pool_calls += 1
        return torch.stack([self.table(torch.tensor(ids)).mean(0) for ids in sentences.ids])

    def make_batch(self, sentences, rows=None, pooled=None):
        rows = list(range(len(sentences)) if rows is None else rows)
        labels = [[*sentences.ids[row], 0] for row in rows]
        if pooled is None:
            pooled = torch.stack([self.table(torch.tensor(sentences.ids[row])).mean(0) for row in rows])
        else:
            pooled = pooled[torch.tensor(rows)]
        return Batch(
            **pack([[0, *ids[:-1]] for ids in labels], labels),
            tokens=torch.tensor([len(ids) for ids in labels]),
            indices=torch.tensor([sentences.source_rows[row] for row in rows]),
            pooled=pooled,
        )

    def forward(self, batch, *, beta=None, eps=None, seed=None, tokens=None):
        beta = self.beta if beta is None else beta
        mu, logvar = self.posterior_head(batch.pooled).chunk(2, dim=-1)
        mu, logvar = full(mu), full(logvar)
        noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(seed)).to(mu) if self.noise else 0.0
        z = mu + noise * torch.exp(0.5 * logvar)
        logits = self.output(self.dropout(z))[batch.rows]
        nll = nn.functional.cross_entropy(full(logits), batch.labels, reduction="none")
        terms = combine(segment_sum(nll, batch.cu_seqlens), batch.tokens, kl_per_dim(mu, logvar).sum(-1), beta)
        return SimpleNamespace(
            loss=terms.loss, reconstruction=terms.reconstruction, kl=terms.kl, beta=beta, nll=nll.detach(),
            tokens=batch.tokens, mu=mu, logvar=logvar, z=z,
        )  # fmt: skip

    def trainable_state_dict(self):
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def load_trainable_state_dict(self, state):
        own = {name: value for name, value in self.named_parameters() if value.requires_grad}
        if own.keys() != state.keys():
            raise CheckpointError("other parameters")
        for name, value in own.items():
            value.copy_(state[name])


def full(tensor):
    """At least float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def sentences(count: int = 60, seed: int = 0) -> list[str]:
    """Distinct sentences of 2 to 8 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [" ".join(f"w{(i * 7 + j * j) % 23}" for j in range(n - 1)) + f" s{i}" for i, n in enumerate(lengths)]
