"""Exponential moving average of the weights: what is validated, kept as best and tested."""

from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from annotated_types import Ge, Gt, Lt
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from boltlab.errors import UserError


class EMA(WeightAveraging):
    """After every `update_every_n_steps` steps: average ← decay · average + (1 - decay) · weights.

    Validation sees the average, a checkpoint's state_dict holds it, and the training goes on with the weights as they
    are, which a resumed run finds in the checkpoint as well. Until step `start_step` the average is the weights.
    `use_buffers` averages a batch norm's statistics too, else they are those of the weights.

    Lightning's EMAWeightAveraging, of which this keeps the checkpoints and the exchange around validation, does the
    rest in ways that do not fit here (2.6.6): it makes the average before the model is on its device, so that on a GPU
    it is kept and computed on the CPU; before pretrained weights are there, so that a validation before the first
    update would be of random ones; parameter by parameter; and it leaves the two exchanged where a validation breaks
    off, for a checkpoint to be made of.

    Raises:
        UserError: the strategy spreads the weights over devices.
    """

    def __init__(
        self,
        decay: Annotated[float, Gt(0), Lt(1)] = 0.999,
        update_every_n_steps: Annotated[int, Ge(1)] = 1,
        start_step: Annotated[int, Ge(0)] = 0,
        use_buffers: bool = True,
    ) -> None:
        super().__init__(use_buffers=use_buffers)
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.start_step = start_step
        self._exchanged = False
        self._weights: list[Tensor] = []  # meanwhile

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.start_step and (step_idx + 1) % self.update_every_n_steps == 0

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("callbacks.ema: weights that are spread over devices cannot be averaged: trainer=ddp")
        self._exchanged = False
        trainer.precision_plugin.convert_module(pl_module)  # which Lightning does only after this hook
        half = pl_module.dtype in (torch.float16, torch.bfloat16)
        function: Any = {"multi_avg_fn": get_ema_multi_avg_fn(self.decay)}
        if half:  # an average of 16 bits would stand still
            update = get_ema_avg_fn(self.decay)
            function = {"avg_fn": lambda average, weight, count: update(average, weight.to(average.dtype), count)}
        self._average_model = AveragedModel(
            pl_module, device=trainer.strategy.root_device, use_buffers=self._use_buffers, **function
        )
        if half:
            self._average_model.module.float()
        # torch asks at each update whether it is the first: a device would be waited for.
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _follow(self, pl_module: "pl.LightningModule") -> None:
        """Before its first update the average is the weights, also those that came after `setup`."""
        average = self._average_model
        if average is not None and average.n_averaged == 0:
            average.update_parameters(pl_module)  # the first one copies
            average.n_averaged.zero_()

    def on_validation_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if self._exchanged:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: "pl.LightningModule") -> None:
        """The average itself stays as it is: weights of 16 bits hold it rounded."""
        tensors = [tensor.data for tensor in (*pl_module.parameters(), *pl_module.buffers())]
        if self._exchanged:
            for tensor in reversed(tensors):
                tensor.copy_(self._weights.pop())
        else:
            self._weights = [tensor.clone() for tensor in tensors]
            self._copy_average_to_current(pl_module)
        self._exchanged = not self._exchanged
