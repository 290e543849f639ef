"""Exponential moving average of the weights: the average is validated, saved, tested and exported."""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from boltlab.ground.errors import UserError


class EMA(Callback):
    """After every `update_every_n_steps` steps: average ← decay · average + (1 - decay) · weights.

    Validation sees the average, and a checkpoint's `state_dict` holds it, so every reader of the file gets what was
    validated. Training continues with the weights as they are; a resumed run finds them in `current_model_state` (the
    keys are those of Lightning's WeightAveraging). Until step `start_step` the average equals the weights.
    `use_buffers` averages a batch norm's statistics too; otherwise they are those of the weights. The average of
    16-bit weights is kept in 32 bits, or it would stand still, and is rounded where it is used.

    Raises:
        UserError: the strategy shards the weights.
    """

    averages_weights = True  # see PAIRS in config/rules.py

    def __init__(
        self,
        decay: Annotated[float, Gt(0), Lt(1)] = 0.999,
        update_every_n_steps: Annotated[int, Ge(1)] = 1,
        start_step: Annotated[int, Ge(0)] = 0,
        use_buffers: bool = True,
    ) -> None:
        self.decay, self.use_buffers = decay, use_buffers
        self.update_every_n_steps, self.start_step = update_every_n_steps, start_step
        self._average: AveragedModel | None = None
        self._weights: dict[str, Tensor] = {}  # while the module holds the average
        self._updated_at = 0  # optimizer steps done at the latest update

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("callbacks.ema: sharded weights cannot be averaged: trainer=ddp")
        self._weights = {}
        trainer.precision_plugin.convert_module(pl_module)  # which Lightning does only after this hook
        half = pl_module.dtype in (torch.float16, torch.bfloat16)
        function: Any = {"multi_avg_fn": get_ema_multi_avg_fn(self.decay)}
        if half:
            update = get_ema_avg_fn(self.decay)
            function = {"avg_fn": lambda average, weight, count: update(average, weight.to(average.dtype), count)}
        self._average = AveragedModel(
            pl_module, device=trainer.strategy.root_device, use_buffers=self.use_buffers, **function
        )
        if half:
            self._average.module.float()
        # At each update torch asks whether it is the first: on a GPU that would be a synchronization.
        self._average.n_averaged = self._average.n_averaged.cpu()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step > max(self._updated_at, self.start_step) and step % self.update_every_n_steps == 0:
            self._averaged().update_parameters(pl_module)
            self._updated_at = step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._exchange(pl_module)

    on_validation_epoch_end = on_validation_epoch_start  # the weights return

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._weights:  # a validation broke off
            self._exchange(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)  # the average is the result of the training

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if not self._weights:
            self._follow(pl_module)
        state, current = self._averaged().state_dict(), checkpoint["state_dict"]
        average = {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}
        current = {key: self._weights.get(key, value) for key, value in current.items()}
        checkpoint.update(state_dict=average, current_model_state=current)
        checkpoint["averaging_state"] = {key: value for key, value in state.items() if not key.startswith("module.")}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return  # what is tested is what was validated: `state_dict`, which Lightning has loaded
        if "averaging_state" not in checkpoint:
            return  # of a run without this callback: the average begins with its weights
        average = {f"module.{key}": value for key, value in checkpoint["state_dict"].items()}
        self._averaged().load_state_dict({**average, **checkpoint["averaging_state"]})
        pl_module.load_state_dict(checkpoint["current_model_state"])

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated_at = state_dict["latest_update_step"]

    def _averaged(self) -> AveragedModel:
        assert self._average is not None
        return self._average

    def _follow(self, pl_module: LightningModule) -> None:
        """Before its first update the average is the weights, also those that came after `setup` (pretrained ones)."""
        average = self._averaged()
        if average.n_averaged == 0:
            average.update_parameters(pl_module)  # the first update copies
            average.n_averaged.zero_()

    @torch.no_grad()
    def _exchange(self, pl_module: LightningModule) -> None:
        """Puts the average in the place of the weights, or the weights back into theirs."""
        tensors = _tensors(pl_module)
        if self._weights:
            values, self._weights = self._weights, {}
        else:
            self._follow(pl_module)
            self._weights = {name: tensor.clone() for name, tensor in tensors.items()}
            values = _tensors(self._averaged().module)
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that have several."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
