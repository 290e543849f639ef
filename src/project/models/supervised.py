"""What Classifier and Regressor share: the steps, the metrics of an epoch, the optimizer and its schedule."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from boltlab.callbacks import ExactMean
from boltlab.data import ImageDataModule
from boltlab.metrics import EpochMeans, counted, log_step, share
from boltlab.optim import Schedule, configure, decayed_parameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from project.models.measured import collection

# (output, target) -> the mean over the batch, as torch's losses give it
Loss = Callable[[Tensor, Tensor], Tensor]


class Supervised(L.LightningModule):
    """A subclass says `criterion`, `train_value` and `predict`; `metrics` makes those of a split.

    Epoch values come from the metric objects alone, which sum over samples and processes, however uneven the batches.
    """

    stacks = True  # for `sweep.engine=vectorized`
    keeps_targets = True  # in their own format where the Trainer's precision is bf16-true or 16-true
    tests_any_split = True  # `test_step` measures what `validation_step` does: `eval split=val` calls it

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Schedule | None,
        l1: float,
        decay_norms_and_biases: bool,
        loss: Loss | None,
        train_metrics: EpochMeans,
        metrics: Callable[[], dict[str, Metric]],
    ) -> None:
        super().__init__()
        self.net, self.make_optimizer, self.scheduler, self.l1, self.loss = net, optimizer, scheduler, l1, loss
        self.decay_norms_and_biases, self.train_metrics = decay_norms_and_biases, train_metrics
        self.val_metrics, self.test_metrics = collection("val", metrics()), collection("test", metrics())

    def criterion(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        """Mean loss of the batch (0-d), and its weight in the means over an epoch and over the processes."""
        raise NotImplementedError

    def train_value(self, output: Tensor, target: Tensor) -> Tensor:
        """What is counted in training beside the loss, of each sample [B]."""
        raise NotImplementedError

    def predict(self, output: Tensor) -> Tensor:
        """From the net's output to what a user reads: probabilities or values."""
        return output

    def mix(self, batch: Any) -> Any:
        """What a training step makes of a batch on the device."""
        return batch

    def forward(self, x: Tensor) -> Tensor:
        """The net's output in float32 (float64 if the net is): losses and metrics lose too much in half precision."""
        output: Tensor = self.net(x.to(self.dtype))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch, batch_idx)
        log_step(self, batch_idx, train_loss_step=loss)
        return loss + self.l1 * self.absolute_weights() if self.l1 else loss

    def training_loss(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of a batch, counted: this process's share of the mean over the samples of all processes."""
        x, target, counts = counted(self, self.mix(batch), batch_idx)
        output = self(x)
        if counts < len(target):
            output, target = output[: counts or None], target[: counts or None]
        loss, weight = self.criterion(output, target)
        if counts == 0:  # it only takes part in what the processes do together
            loss, weight = output.sum() * 0, weight * 0
        else:
            self.train_metrics.add(loss.detach(), weight, self.train_value(output.detach(), target))
        loss, self.loss_weight = share(self, loss, weight, batch_idx)  # ExactMean asks for it
        return loss

    def absolute_weights(self) -> Tensor:
        """The sum of the absolute values of all weights that decay."""
        sums = [p.abs().sum() for _, p, decays in decayed_parameters(self.net) if decays]
        whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in sums]  # of all processes
        return torch.stack(whole).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.evaluate(batch, self.test_metrics)

    def evaluate(self, batch: Any, metrics: MetricCollection) -> dict[str, Tensor]:
        x, target = batch
        output = self(x)
        loss, weight = self.criterion(output, target)
        metrics.update(preds=output, target=target, value=loss, weight=weight)
        return {"output": output, "target": target}

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.predict(self(batch if isinstance(batch, Tensor) else batch[0]))

    def on_train_epoch_start(self) -> None:
        self.train_metrics.reset()

    def on_train_epoch_end(self) -> None:
        self.log_epoch(self.train_metrics)

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()  # of a validation that was broken off

    def on_validation_epoch_end(self) -> None:
        self.log_epoch(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self.log_epoch(self.test_metrics)

    def log_epoch(self, metrics: MetricCollection | EpochMeans) -> None:
        # compute() has already joined the processes, uneven shards included; what sync_dist takes of equal numbers
        # only keeps Lightning from warning. Of the mean of three, the last bit could be another.
        self.log_dict(self.defined(metrics.compute()), sync_dist=True, reduce_fx="max", prog_bar=True)
        metrics.reset()

    def defined(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of an epoch's values that so few samples have."""
        return values

    def configure_callbacks(self) -> list[L.Callback]:
        """Where batches are accumulated, a step is the mean over all of their samples."""
        return [ExactMean()]

    def setup(self, stage: str) -> None:
        # Of a new training only: to load a trained run, nothing but its checkpoint is needed.
        net: Any = self.net
        if stage == "fit" and self.trainer.ckpt_path is None and hasattr(net, "load_pretrained"):
            self.say_other_images(net.load_pretrained() or {})

    def say_other_images(self, trained_on: dict[str, Any]) -> None:
        """Names in a line what the images of pretrained weights were like where those of the data are not.

        trained_on: mean and std of the channels, and the interpolation that has resized them.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule) or not self.trainer.is_global_zero:
            return
        said = []
        for name, default in (("mean", 0.0), ("std", 1.0)):
            theirs, ours = list(trained_on.get(name, ())), list(getattr(data, name) or [default])
            ours *= len(theirs) if len(ours) == 1 else 1
            if len(theirs) == data.input_shape[0] and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
                said.append(f"'data.{name}={[round(value, 4) for value in theirs]}'")
        how = trained_on.get("interpolation", "bilinear")
        said += [f"{how} interpolation (the data's is bilinear)"] if how != "bilinear" else []
        if said:
            print(f"the pretrained weights were trained with other images: {', '.join(said)}", flush=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.net, self.make_optimizer, self.scheduler, self.decay_norms_and_biases)
