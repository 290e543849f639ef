"""Ends a run whose validation or test loss, or monitored metric, is NaN or infinite."""

import re

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from boltlab.ground.errors import NonFiniteLoss


class FiniteMetrics(Callback):
    """Checks the metrics of each validation, before a checkpoint is chosen by them, and those of the test.

    A loss (a name whose last word is `loss`) and every metric that a callback monitors must be finite. Any other metric
    that is not, such as the AUROC of a class without samples or the R² of one row, is named once.

    Raises:
        NonFiniteLoss: on all processes: metrics are the same on each.
    """

    def __init__(self) -> None:
        self._named: set[str] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._look(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        numbers = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        bad = [name for name, value in numbers.items() if not bool(torch.isfinite(value).all())]
        monitored = {getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        fatal = [name for name in bad if name in monitored or re.split(r"[^A-Za-z0-9]+", name)[-1].lower() == "loss"]
        if fatal:
            name = fatal[0]
            raise NonFiniteLoss(
                f"{name} is {float(numbers[name])} after step {trainer.global_step}: the run ends, and no checkpoint is"
                " chosen by it. What often helps: a smaller optimizer.lr, precision=32; boltlab doctor data=…"
            )
        new = sorted(set(bad) - self._named)
        self._named |= set(new)
        if new and trainer.is_global_zero:
            values = ", ".join(f"{name} is {float(numbers[name])}" for name in new)
            print(f"not a finite number: {values} (said once)", flush=True)
