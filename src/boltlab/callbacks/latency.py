"""How long one sample takes, forward, on the device of the training: an objective for a sweep."""

import statistics
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Latency(Callback):
    """``latency_ms`` is known when the training has ended, and goes into the run's summary: the median over ``repeats``
    forward passes of a batch of one, in milliseconds, after a tenth as many to warm up. What else is at work on the
    same cores or GPU is measured too: for numbers that can be compared, one trial at a time (``workers=1``).
    """

    def __init__(self, repeats: int = 100) -> None:
        self.repeats = repeats
        self.latency_ms: float | None = None

    def run_summary(self) -> dict[str, Any]:
        """Values for the summary of the run."""
        return {} if self.latency_ms is None else {"latency_ms": self.latency_ms}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "samples"):
            if trainer.is_global_zero:
                print(f"latency_ms is not measured: {type(data).__name__} has no samples(split, indices)", flush=True)
            return
        x, _ = data.samples("val", [0])
        if not trainer.is_global_zero or trainer.world_size > 1:
            return
        x, times, training = x.to(pl_module.device), [], pl_module.training
        pl_module.eval()
        # As in validation: inside of the precision's autocast.
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for _ in range(self.repeats + self.repeats // 10):
                _wait(pl_module.device)
                begin = time.perf_counter()
                pl_module(x)
                _wait(pl_module.device)
                times.append(time.perf_counter() - begin)
        pl_module.train(training)
        self.latency_ms = 1000 * statistics.median(times[self.repeats // 10 :])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
