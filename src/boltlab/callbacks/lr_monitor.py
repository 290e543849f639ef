"""Logs the learning rate beside the training loss."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class LRMonitor(Callback):
    """Logs ``lr`` at the steps at which Lightning logs (``trainer.log_every_n_steps``), before the step uses it.

    One name for all parameter groups that share a rate, so the groups with and without weight decay are one curve;
    where rates differ, the others are ``lr_1``, ``lr_2``, …; those of a second optimizer begin with ``optimizer1_``.
    Lightning's LearningRateMonitor needs a schedule and a logger; this one works without either.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (step + 1) % every or step == self._logged_step:  # accumulated batches share a step
            return
        self._logged_step = step
        rates = learning_rates(trainer)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **rates}, step=step)


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """Names and current learning rates, as they are logged."""
    rates: dict[str, float] = {}
    for number, optimizer in enumerate(trainer.optimizers):
        prefix = f"optimizer{number}_" if number else ""
        distinct = list(dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups))
        for place, rate in enumerate(distinct):
            rates[f"{prefix}lr_{place}" if place else f"{prefix}lr"] = rate
    return rates
