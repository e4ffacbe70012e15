"""Training: objective and schedules, cached features, packing, the loop, and checkpoints that survive a kill."""

from lmvae_fast.training.callbacks import Callback, TensorBoard
from lmvae_fast.training.loop import train
from lmvae_fast.training.progress import TrainResult

__all__ = ["Callback", "TensorBoard", "TrainResult", "train"]
