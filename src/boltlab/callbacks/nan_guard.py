"""Stops a run whose loss or weights are no longer finite, before a checkpoint is made of them."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from boltlab.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or the weights became NaN or infinite; the message names step, epoch and batch."""


class NaNGuard(Callback):
    """Looks at the training loss, and at the weights before they are saved.

    On one CPU process it looks at each step's loss. Reading a value from an accelerator waits for it, and processes
    must agree before they stop, so there the losses are kept on the device and looked at together, every
    ``every_n_steps`` steps. Whatever is pending is looked at before validation and before any checkpoint.

    Raises:
        NonFiniteLoss: on all processes, at the same step.
    """

    several_steps = True  # see steps_per_execution

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._stride = 1
        self._since = 0
        self._pending: list[tuple[Tensor, int, int, int]] = []  # loss, step, epoch, batch
        self._ending = False

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        local = trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1
        self._stride = 1 if local else self.every_n_steps
        self._since, self._ending = 0, False
        self._pending.clear()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(outputs, Mapping) and "step_losses" in outputs:  # of several steps, see steps_per_execution
            epoch = trainer.current_epoch
            self._pending += [(loss, step, epoch, batch) for loss, step, batch in outputs["step_losses"]]
        elif isinstance(loss, Tensor):
            self._pending.append((loss.detach(), trainer.global_step, trainer.current_epoch, batch_idx))
        self._since += 1
        if self._since >= self._stride:
            self._look(trainer)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # Raising here leaves the files of earlier checkpoints as they are: this one has not been opened yet.
        self._look(trainer)
        # A finite loss can have gradients that are not. save_weights_only checkpoints do not come by here.
        problem = None
        if not _finite(checkpoint.get("state_dict", {})):
            problem = f"weights are not finite after step {trainer.global_step} (epoch {trainer.current_epoch})"
        self._agree(trainer, problem)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._ending = True  # the other processes may be elsewhere: ask them nothing any more
        if isinstance(exception, NonFiniteLoss):
            for callback in trainer.checkpoint_callbacks:  # they come after this callback
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False

    def _look(self, trainer: "pl.Trainer") -> None:
        pending, self._pending, self._since = self._pending, [], 0
        losses = [loss for loss, *_ in pending]
        # One value is read directly: on a CPU, stacking would cost more than everything else here.
        values = [losses[0].item()] if len(losses) == 1 else torch.stack(losses).tolist() if losses else []
        problem = None
        for value, (_, step, epoch, batch) in zip(values, pending, strict=True):
            if not math.isfinite(value):
                problem = f"the training loss is {value} at step {step} (epoch {epoch}, batch {batch}, both from 0)"
                break
        self._agree(trainer, problem)

    def _agree(self, trainer: "pl.Trainer", problem: str | None) -> None:
        """Raises on every process if there is a problem on one."""
        alone = trainer.world_size == 1 or self._ending
        if not alone and not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            problem = problem or "the training loss or a weight is not finite on another process"
        if problem:
            raise NonFiniteLoss(
                f"{problem}. Training stops; the checkpoints hold the weights from before. What often helps: a smaller"
                " optimizer.lr, trainer.gradient_clip_val=1, precision=32; trainer.detect_anomaly=true names the"
                " operation."
            )


def _finite(state: Mapping[str, Any]) -> bool:
    tensors = [t for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # a sharded weight's own part
    return bool(torch.stack([t.detach().isfinite().all().cpu() for t in tensors]).all()) if tensors else True
