"""The one training loop: transformers' Trainer with a loss that is handed in."""

from factormix.train.distillation import distillation
from factormix.train.loop import Batches, LoopConfig, Loss, TrainResult, bf16_pays, step_tokens, train

__all__ = ["Batches", "LoopConfig", "Loss", "TrainResult", "bf16_pays", "distillation", "step_tokens", "train"]
