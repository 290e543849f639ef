"""What is measured at test is measured by `trainer.validate` too."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class AtTest(Callback):
    """A callback of the test loop, whose hooks also serve ``trainer.validate``; the validation of a fit is left out."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)


def classes(trainer: Trainer, outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Logits [B, classes] and classes int64 [B] of what a step returned, `{"output": …, "target": …}`; None where it
    returned something else."""
    if not isinstance(outputs, Mapping):
        return None
    if getattr(getattr(trainer, "datamodule", None), "task", "classification") != "classification":
        return None
    output, target = outputs.get("output"), outputs.get("target")
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    fits = output.ndim == 2 and target.shape == output.shape[:1] and output.is_floating_point()
    return (output.detach(), target) if fits else None


def class_names(trainer: Trainer, count: int) -> list[str]:
    """The names that the data module has for so many classes, else their numbers."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return [str(name) for name in (names if isinstance(names, (list, tuple)) and len(names) == count else range(count))]


def most(trainer: Trainer, number: int) -> int:
    """The largest of what the processes have: one without a batch has seen no classes."""
    if trainer.world_size == 1:
        return number
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))


def sharing(pl_module: LightningModule) -> Any:
    """The group of the processes that see different samples; None is all. (A tensor-parallel group shares its own.)"""
    mesh = pl_module.device_mesh
    return None if mesh is None else mesh["data_parallel"].get_group()


def tell(trainer: Trainer, method: str, *arguments: Any) -> None:
    """Calls a method of all loggers that have it."""
    for logger in trainer.loggers:
        if hasattr(logger, method):
            getattr(logger, method)(*arguments)
