"""Training: objective and schedules, cached features, batch plans, the loop, and checkpoints that survive a kill."""

from lmvae_fast.training.callbacks import Callback, TensorBoard
from lmvae_fast.training.loop import train
from lmvae_fast.training.records import TrainResult

__all__ = ["Callback", "TensorBoard", "TrainResult", "train"]
