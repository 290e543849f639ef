"""The length of a training whose accumulated batches change with the epoch: Lightning's own count knows one number."""

import math
from typing import Any

import lightning.pytorch as pl


class Counting(pl.Trainer):
    """A Trainer with a GradientAccumulationScheduler, for schedules of any module that ask for the number of steps."""

    def steps_of(self, epoch: int) -> float:
        """Optimizer steps of an epoch; infinite where it has no length."""
        schedule: Any = next(c for c in self.callbacks if hasattr(c, "get_accumulate_grad_batches"))  # type: ignore[attr-defined]
        batches = self.num_training_batches / schedule.get_accumulate_grad_batches(epoch)
        return math.ceil(batches) if math.isfinite(batches) else batches

    @property
    def estimated_stepping_batches(self) -> int | float:
        estimated = super().estimated_stepping_batches  # also makes the trainer count its batches
        if self.max_epochs in (None, -1) or not math.isfinite(self.num_training_batches):
            return estimated
        steps = sum(self.steps_of(epoch) for epoch in range(max(self.max_epochs or 0, 1)))
        return steps if self.max_steps == -1 else min(steps, self.max_steps)
