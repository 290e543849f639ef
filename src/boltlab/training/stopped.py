"""What ends a training before its length: early stopping, or a time limit. It is said, and kept in summary.json."""

import csv
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def early(trainer: Any, folder: Path) -> dict[str, str | None]:
    """For the summary: `stopped_early`, which is printed too; None where the training has reached its length."""
    whole = trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
    reason = None if whole or not trainer.should_stop else _reason(trainer, folder)
    if reason:
        print(
            f"the training ended after epoch {trainer.current_epoch}, step {trainer.global_step}: {reason}", flush=True
        )
    return {"stopped_early": reason}


def _reason(trainer: Any, folder: Path) -> str | None:
    for stopping in (c for c in trainer.callbacks if isinstance(c, EarlyStopping) and c.stopping_reason_message):
        if stopping.stopping_reason != EarlyStoppingReason.PATIENCE_EXHAUSTED:
            said = str(stopping.stopping_reason_message)
            return f"early stopping: {said.removesuffix('Signaling Trainer to stop.').rstrip(' .')}"
        best = float(stopping.best_score)
        since = _since(folder / "metrics.csv", stopping.monitor, best)
        values = f"{stopping.wait_count} value{'s' * (stopping.wait_count > 1)}"
        return f"early stopping: {stopping.monitor} got no better than {best:.4g}{since}, for {values}"
    for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):
        left = timer.time_remaining()
        if left is not None and left <= 0:
            return f"trainer.max_time is over{_scheduled(trainer)}"
    return None


def _since(path: Path, metric: str, best: float) -> str:
    """When the best value was logged."""
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric)]
    found = [row for row in rows if math.isclose(float(row[metric]), best, rel_tol=1e-6)]
    return f" since epoch {int(found[-1]['epoch']) + 1}, step {int(found[-1]['step']) + 1}" if found else ""


def _scheduled(trainer: Any) -> str:
    steps = trainer.estimated_stepping_batches if trainer.lr_scheduler_configs else math.inf
    return f", and the schedule of the learning rate is made for {steps} steps" if 0 < steps < math.inf else ""


def timed(trainer: Any) -> str | None:
    """Says at the start that a time limit may cut the schedule of the learning rate off."""
    limit = any(isinstance(c, Timer) for c in trainer.callbacks)
    if not limit or not (scheduled := _scheduled(trainer)):
        return None
    return f"trainer.max_time may end the training earlier than trainer.max_epochs or max_steps{scheduled}"
