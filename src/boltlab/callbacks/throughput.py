"""Samples per second, and the share of the time in which training waits for data."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from boltlab.callbacks.overhead import FetchClock


class Throughput(Callback):
    """Times training steps only: validation, checkpoints at its end and the start of the run are left out.

    Logs ``samples_per_second`` (all processes together) and ``data_wait_share`` (0 to 1) at the end of each epoch. The
    properties of the same names are those of the whole fit, from ``samples``, ``seconds`` and ``wait_seconds``.
    The clock is the host's and is read at no extra synchronization: on an accelerator that lags behind the host, some
    of the wait costs nothing, so a small share is good and a large one is worth a look.
    """

    def __init__(self) -> None:
        self.samples, self.steps, self.seconds = 0, 0, 0.0
        self._clock = FetchClock()
        self._waited_before = 0.0  # what the clock had counted when the fit began
        self._epoch_start = (0, 0.0, 0.0)
        self._mark: float | None = None  # since when the running step counts

    @property
    def wait_seconds(self) -> float:
        return self._clock.wait_seconds - self._waited_before

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def epoch_samples_per_second(self) -> float:
        """Of the running epoch, or of the last one."""
        samples, seconds, _ = self._epoch_start
        return (self.samples - samples) / (self.seconds - seconds) if self.seconds > seconds else 0.0

    def run_summary(self) -> dict[str, Any]:
        """Values for the summary of the run."""
        values = {"samples_per_second": self.samples_per_second, "data_wait_share": self.data_wait_share}
        return values if self.samples_per_second else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples, self.steps, self.seconds, self._mark = 0, 0, 0.0, None
        # The processes of a tensor-parallel group share their batches.
        self._shares = trainer.world_size // getattr(trainer.strategy, "tensor_parallel_size", 1)
        profiler = trainer.profiler  # type: ignore[attr-defined]
        self._clock = profiler if isinstance(profiler, FetchClock) else FetchClock(profiler)
        trainer.profiler = self._clock  # type: ignore[attr-defined]
        self._waited_before = self._clock.wait_seconds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = (self.samples, self.seconds, self.wait_seconds)
        self._mark = time.perf_counter()  # starting the workers counts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - (self._clock.fetch_start if self._mark is None else self._mark)
        self._mark = now
        self.samples += batch_samples(batch) * self._shares
        self.steps += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = None  # the next step counts from its fetch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, seconds, wait_seconds = self._epoch_start
        if self.seconds > seconds:
            share = (self.wait_seconds - wait_seconds) / (self.seconds - seconds)
            values = {"samples_per_second": self.epoch_samples_per_second, "data_wait_share": share}
            for logger in trainer.loggers:  # the step under which Lightning logs the epoch's metrics
                logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=trainer.global_step - 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._clock.around is not None:
            trainer.profiler = self._clock.around  # type: ignore[attr-defined]


def batch_samples(batch: Any) -> int:
    """Length of the first tensor in a batch of tensors, tuples, lists, dicts and dataclasses; 0 if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if is_dataclass(batch):
        batch = vars(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    for part in parts:
        if not isinstance(part, str) and (found := batch_samples(part)):
            return found
    return 0
