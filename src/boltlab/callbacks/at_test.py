"""What is measured at test is measured by `trainer.validate` too."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class AtTest(Callback):
    """A callback of the test loop, whose hooks also serve ``trainer.validate``; the validation of a fit is left out."""

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: "pl.Trainer", *arguments: Any, **_: Any) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments)

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)


def classification(trainer: "pl.Trainer") -> bool:
    return getattr(getattr(trainer, "datamodule", None), "task", None) == "classification"


def sharing(pl_module: "pl.LightningModule") -> Any:
    """The group of the processes that see different samples; None is all. (A tensor-parallel group shares its own.)"""
    mesh = pl_module.device_mesh
    return None if mesh is None else mesh["data_parallel"].get_group()


def tell(trainer: "pl.Trainer", method: str, *arguments: Any) -> None:
    """Calls a method of all loggers that have it."""
    for logger in trainer.loggers:
        if hasattr(logger, method):
            getattr(logger, method)(*arguments)
