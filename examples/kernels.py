"""The ops in a model that is not ours: a sentence VAE in plain torch, with a GRU on either side.

python examples/kernels.py
"""

import torch
from torch import nn

from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.kernels.posterior import posterior_sample


class SentenceVAE(nn.Module):
    def __init__(self, vocabulary: int, width: int = 64, latent: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.reader, self.writer = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.posterior, self.start = nn.Linear(width, 2 * latent), nn.Linear(latent, width)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mu, logvar = self.posterior(self.reader(self.embedding(ids))[1][0]).chunk(2, dim=-1)
        z, kl = posterior_sample(mu, logvar, seed=None)  # sample and KL in one pass; the noise is never stored
        hidden, _ = self.writer(self.embedding(ids[:, :-1]), self.start(z).unsqueeze(0))
        # no [tokens, vocabulary] logits, and the head's gradient is made in the forward pass
        loss, _ = lm_head_loss(hidden.flatten(0, 1), self.embedding.weight, ids[:, 1:].flatten())
        return loss / len(ids), kl.mean()


torch.manual_seed(0)
model, ids = SentenceVAE(vocabulary=5000), torch.randint(5000, (32, 12))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(30):
    nll, kl = model(ids)
    optimizer.zero_grad()
    (nll + 0.1 * kl).backward()
    optimizer.step()
    if step % 10 == 0 or step == 29:
        print(f"step {step}: {nll.item():.2f} + 0.1 * {kl.item():.2f} nats a sentence")
