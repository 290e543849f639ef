"""What a training does to any module before its first step: compilation, memory format, Lightning's idle hooks."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from torch import nn
from torchmetrics import Metric, MetricCollection

from boltlab.callbacks.overhead import spare, spared

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Prepare(Callback):
    """Applies the root keys `compile` and `channels_last` to the nets of a module: its children that have parameters.

    compile: whether, or a mode of torch.compile. In place: `torch.compile(net)` would put `_orig_mod.` into every key
        of a checkpoint.
    """

    def __init__(self, compile: bool | str, channels_last: bool) -> None:
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        for net in nets(pl_module):
            if self.channels_last:
                net.to(memory_format=torch.channels_last)
            if self.compile and stage == "fit":
                net.compile(mode=self.mode(trainer))
        if stage == "fit":
            spare(trainer, pl_module)
        if hasattr(trainer.strategy, "spread") and not is_overridden("configure_model", pl_module):
            spread = partial(trainer.strategy.spread, pl_module, nets(pl_module))
            pl_module.configure_model = spread  # type: ignore[method-assign]

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            spared()

    def mode(self, trainer: Any) -> str:
        mode = self.compile if isinstance(self.compile, str) else "default"
        cuda = trainer.strategy.root_device.type == "cuda"  # the module itself is moved there after the setup
        accumulates = trainer.accumulate_grad_batches > 1
        accumulates |= any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
        # The next batch's graph overwrites the gradients of this one, so that they cannot be accumulated.
        return _WITHOUT_GRAPHS.get(mode, mode) if cuda and accumulates else mode

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Says what was chosen: much of it is chosen by itself."""
        if not trainer.is_global_zero:
            return
        names = []
        for optimizer in trainer.optimizers:
            fused = "fused " if any(group.get("fused") for group in optimizer.param_groups) else ""
            names.append(f"{fused}{type(optimizer).__name__}")
        tf32 = pl_module.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        parts = [
            f"{pl_module.device}: precision {trainer.precision}",
            "channels_last" if self.channels_last else "contiguous",
            "TF32" if tf32 else "",
            *dict.fromkeys(names),
            f"compiled ({self.mode(trainer)})" if self.compile else "not compiled",
        ]
        get_console().print(", ".join(part for part in parts if part), highlight=False, soft_wrap=True)


def nets(module: nn.Module) -> list[nn.Module]:
    """The children of a module that have parameters."""
    children = (child for child in module.children() if not isinstance(child, (Metric, MetricCollection)))
    return [child for child in children if any(True for _ in child.parameters())]
