"""Accumulated batches as one: the gradient of a step is the mean over the samples of its window."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from boltlab.ground.errors import UserError


class ExactMean(Callback):
    """With `trainer.accumulate_grad_batches`, a step is that of one batch which holds all samples of the window.

    Lightning divides each loss by the number of batches in a full window. That is the mean over the samples where all
    batches are of one size and all windows are full; a smaller last batch counts too much, and the batches of a shorter
    last window too little. Here each loss is weighted by its samples, and the gradients are divided by the sum of the
    weights before they are clipped. Steps of full windows of equal batches keep their bits.

    For losses that are means over samples. A module whose loss is another mean sets `self.loss_weight` in
    `training_step`: what the loss was divided by, on average over the processes; a number or a tensor without
    dimensions. Otherwise it is the batch's number of samples.

    Raises:
        UserError: the module optimizes manually, and so divides by itself.
    """

    weighs_windows = True

    def __init__(self) -> None:
        self._full: Any = None  # the weight that Lightning's division is right for: that of the run's first batch
        self._sum: Any = 0  # of the window's weights
        self._batch: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        schedules = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches == 1 and not schedules:
            for name in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"):
                setattr(self, name, None)  # Lightning passes over a hook that cannot be called

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise UserError("callbacks.exact_mean: this module optimizes manually and divides its losses itself")
        self._full = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch if trainer.accumulate_grad_batches > 1 else None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._sum = 0  # also where the step of the window before was not taken

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.accumulate_grad_batches == 1:
            return
        weight = getattr(pl_module, "loss_weight", None)
        weight = extract_batch_size(self._batch) if weight is None else weight
        if self._full is None:
            self._full = trainer.strategy.broadcast(float(weight)) or 1.0
        self._sum = self._sum + weight
        share = weight / self._full
        if isinstance(share, Tensor) or share != 1:
            loss.register_hook(lambda gradient: gradient * share)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.accumulate_grad_batches == 1 or self._full is None:
            return
        total = self._sum
        if trainer.world_size > 1 and getattr(pl_module, "loss_weight", None) is None:
            here = torch.tensor(float(total), device=pl_module.device)
            total = trainer.strategy.reduce(here, reduce_op="mean").item()
        factor = trainer.accumulate_grad_batches * self._full / total
        if isinstance(factor, Tensor) or factor != 1:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
