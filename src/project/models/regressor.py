"""Regression of one number: mean squared error, mean absolute error, R²."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from boltlab.metrics import EpochMeans
from boltlab.optim import Schedule
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score

from project.models.measured import joined, logged
from project.models.supervised import Loss, Supervised


class ExactR2(R2Score):
    """R² in float64, where the device has it: a difference of large sums if the targets lie far from 0."""

    def __init__(self) -> None:
        super().__init__()
        if not torch.backends.mps.is_available():
            self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        dtype = self.sum_error.dtype  # self.dtype forgets what it was set to when the metric moves to a device
        super().update(preds.to(dtype), target.to(dtype))

    def compute(self) -> Tensor:
        if int(self.total) < 2:  # no number; torchmetrics raises
            return torch.full_like(self.sum_error, torch.nan)
        value: Tensor = super().compute()
        return value


class Regressor(Supervised):
    """Trains a net [B, …] → [B, 1] with the mean squared error, or another `loss`, on targets [B].

    The other arguments are the Classifier's.
    """

    stacks = True  # for `sweep.engine=vectorized`
    task = "regression"  # data with classes are refused

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Schedule | None = None,
        l1: float = 0.0,
        decay_norms_and_biases: bool = False,
        loss: Loss | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        measured = partial(self._metrics, metrics)
        super().__init__(net, optimizer, scheduler, l1, decay_norms_and_biases, loss, EpochMeans("mse"), measured)
        self.left_out: set[str] = set()  # metrics that so few rows do not have

    @staticmethod
    def _metrics(own: dict[str, Metric] | None = None) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": ExactR2()}
        return joined(metrics, own)

    @classmethod
    def logged_metrics(cls, arguments: dict[str, Any]) -> dict[str, bool | None]:
        """Every metric name that a run with these arguments logs, and whether it is better when it is larger."""
        return logged(cls._metrics(), "mse", arguments.get("metrics"))

    def forward(self, x: Tensor) -> Tensor:
        """Values [B]."""
        return super().forward(x).squeeze(-1)

    def defined(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        finite = {name for name, value in values.items() if value.isfinite()}
        left_out = {f"{split}_r2" for split in ("val", "test") if f"{split}_mse" in finite} & (values.keys() - finite)
        for name in left_out - self.left_out:
            self.print(f"{name} is left out: R² needs two rows at least")
        self.left_out |= left_out
        return {name: value for name, value in values.items() if name not in left_out}

    def criterion(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        if output.shape != target.shape:  # broadcasting would train a wrong model in silence
            raise ValueError(f"net gives {tuple(output.shape)} for targets {tuple(target.shape)}; both must be [B]")
        loss = F.mse_loss if self.loss is None else self.loss
        return loss(output, target.to(output.dtype)), len(target)

    def train_value(self, output: Tensor, target: Tensor) -> Tensor:
        """The squared error."""
        return (output - target).square()
