"""A live bar on a terminal, a plain line an epoch everywhere."""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor


class ProgressLines(ProgressBar):
    """Prints a line for each epoch; on a terminal, a bar below them shows what runs now.

    The bar is drawn by the training loop itself, at most every ``refresh_seconds``, and only then is the loss read
    from the device: other steps pay for one look at the clock. Without a terminal, epochs that last longer than
    ``plain_seconds`` print a line at that interval.

    Args:
        metrics: what the line of an epoch shows, in this order, of what is logged (``trainer.callback_metrics``).
    """

    def __init__(
        self, metrics: list[str] | None = None, refresh_seconds: float = 0.25, plain_seconds: float = 60.0
    ) -> None:
        super().__init__()
        self.metrics = list(dict.fromkeys(metrics or ["train_loss", "val_loss"]))
        self.refresh_seconds, self.plain_seconds = refresh_seconds, plain_seconds
        self.is_enabled = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._next_draw = 0.0
        self._epoch: int | None = None  # whose line has not been printed
        self._epoch_end: list[str] = []

    def disable(self) -> None:
        """Lightning calls this on all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    # ---------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_start = self._epoch_start = time.monotonic()
        self._start_fraction = self._fraction(trainer, 0)
        self._epoch, self._validated = None, False
        self._open("")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_epoch(trainer)
        self._epoch, self._epoch_start, self._validated = trainer.current_epoch, time.monotonic(), False
        self._begin(_epoch_name(trainer, trainer.current_epoch), trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() < self._next_draw or not self.is_enabled:
            return
        parts = [f"{batch_idx + 1}/{trainer.num_training_batches}"]
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            parts.append(f"loss {loss.item():.4g}")
        parts += [_speed(trainer), self._left(trainer, batch_idx + 1)]
        self._draw(batch_idx + 1, parts, plain=_epoch_name(trainer, trainer.current_epoch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_end = [_speed(trainer), _clock(time.monotonic() - self._epoch_start)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_epoch(trainer)

    def _print_epoch(self, trainer: Trainer) -> None:
        # Not in on_train_epoch_end: the model logs its epoch's metrics after the callbacks' hook of that name.
        if self._epoch is None or not self.is_enabled:
            return
        values = trainer.callback_metrics
        shown = [name for name in self.metrics if name in values and (self._validated or not name.startswith("val_"))]
        parts = [_epoch_name(trainer, self._epoch), *(f"{name} {float(values[name]):.4f}" for name in shown)]
        parts += [*self._epoch_end, self._left(trainer, 0)]
        get_console().print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)
        self._epoch = None

    def _left(self, trainer: Trainer, batches: int) -> str:
        """Time until the end of the fit, judged by what this process has done of it."""
        done, start = self._fraction(trainer, batches), self._start_fraction
        if not start < done < 1:
            return ""
        return f"{_clock((time.monotonic() - self._fit_start) / (done - start) * (1 - done))} left"

    @staticmethod
    def _fraction(trainer: Trainer, batches: int) -> float:
        """How much of the fit is done, 0 to 1; 0 where nothing tells its length."""
        done = 0.0
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            done = (trainer.current_epoch + batches / max(1, trainer.num_training_batches)) / trainer.max_epochs
        if trainer.max_steps > 0:
            done = max(done, trainer.global_step / trainer.max_steps)
        return done if math.isfinite(done) else 0.0

    # ---------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        self._open("validate")

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluated(trainer.num_val_batches, *arguments)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._begin(_epoch_name(trainer, trainer.current_epoch), trainer.num_training_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("test")

    def on_test_batch_end(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluated(trainer.num_test_batches, *arguments)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("predict")

    def on_predict_batch_end(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        self._evaluated(trainer.num_predict_batches, *arguments)

    def _evaluated(
        self, totals: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._bar is None or time.monotonic() < self._next_draw:
            return
        total = totals[dataloader_idx] if isinstance(totals, list) else totals
        self._bar.update(self._task, total=total if math.isfinite(total) else None)
        self._draw(batch_idx + 1, [f"{batch_idx + 1}/{total}"])

    # ---------------------------------------------------------------- the bar

    def on_exception(self, *_: Any) -> None:
        self._close()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close()

    def _open(self, name: str) -> None:
        console = get_console()
        if self.is_enabled and self._bar is None and console.is_interactive:
            # auto_refresh would be a thread that takes the interpreter from the training loop ten times a second.
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[status]}"),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task(name, status="")
            self._bar.start()
        self._begin(name, 0)

    def _begin(self, name: str, total: float) -> None:
        """What runs now has changed."""
        self._next_draw = time.monotonic() + (0.0 if self._bar else self.plain_seconds)
        if self._bar:
            finite = total if math.isfinite(total) and total > 0 else None
            self._bar.reset(self._task, description=name, total=finite, status="")

    def _draw(self, completed: int, parts: list[str], plain: str = "") -> None:
        status = "  ".join(part for part in parts if part)
        if self._bar:
            self._next_draw = time.monotonic() + self.refresh_seconds
            self._bar.update(self._task, completed=completed, status=status)
            self._bar.refresh()
        else:
            self._next_draw = time.monotonic() + self.plain_seconds
            get_console().print(f"{plain}  {status}", highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _epoch_name(trainer: Trainer, epoch: int) -> str:
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return f"epoch {epoch + 1}"
    return f"epoch {epoch + 1:{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"


def _speed(trainer: Trainer) -> str:
    """From the throughput callback, where there is one."""
    speeds = [c.epoch_samples_per_second for c in trainer.callbacks if hasattr(c, "epoch_samples_per_second")]  # type: ignore[attr-defined]
    return f"{speeds[0]:,.0f} samples/s" if speeds else ""


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
