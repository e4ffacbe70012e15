"""A model in Lightning: its training step, the weight of its KL, and what it trains.

python examples/lightning_module.py [STEPS]     # needs: pip install lightning
"""

import sys

import lightning
import torch

import lmvae_fast as lf
from lmvae_fast.training.schedule import beta_at


class SentenceVAE(lightning.LightningModule):
    def __init__(self, model: lf.LMVAE, config: lf.TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def training_step(self, batch: lf.Batch, index: int) -> torch.Tensor:
        beta = beta_at(self.global_step, int(self.trainer.estimated_stepping_batches), self.config)
        out = self.model(batch, beta=beta)
        self.log_dict({"loss": out.loss, "kl": out.kl.mean(), "beta": beta}, prog_bar=True, batch_size=batch.batch_size)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.config.learning_rate)


steps = int(sys.argv[1]) if sys.argv[1:] else 30
config = lf.TrainConfig(learning_rate=3e-3, beta_cycles=1)
vae = SentenceVAE(lf.testing.make_model("llama", max_len=24), config)
data = vae.model.tokenize(lf.generate_corpus(400))
pooled = vae.model.pool(data)  # the encoder is frozen: it runs once
batches = [vae.model.make_batch(data, range(i, min(i + 32, len(data))), pooled) for i in range(0, len(data), 32)]
trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, accelerator="cpu")
trainer.fit(vae, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True))
print("loss", float(trainer.callback_metrics["loss"]), vae.model.decode(vae.model.encode(data[:2]).mu))
