"""What every task shares: metrics by split, the optimizer's parameter groups, the schedule, compilation."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from boltlab.callbacks.exact_mean import ExactMean
from boltlab.metrics.means import EpochMeans, MeanLoss
from boltlab.optim.build import configure, decayed_parameters
from boltlab.optim.schedulers import Schedule
from boltlab.strategies.sync_batch_norm import CPUSyncBatchNorm, synchronized


def _whole(value: Tensor) -> Tensor:
    """A sum over a tensor whose parts lie on several processes."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _mean_over_processes(value: Tensor) -> Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


class Logged(dict[str, bool | None]):
    """The names of what is logged, and whether larger is better, None where nobody says so. `|` takes a set too."""

    def __or__(self, other: Any) -> "Logged":  # type: ignore[override]
        return Logged({**self, **(other if isinstance(other, Mapping) else dict.fromkeys(other))})


def logged(metrics: dict[str, Metric], train: str) -> Logged:
    """What a task logs that has these metrics in val and test, and one of them, `train`, in training."""
    known = {"loss": False, **{name: metric.higher_is_better for name, metric in metrics.items()}}
    found = Logged({f"{split}_{name}": larger for split in ("val", "test") for name, larger in known.items()})
    return found | {"train_loss": False, "train_loss_step": False, f"train_{train}": known[train]}


class Task(L.LightningModule):
    """Base of the Lightning modules: a subclass brings its metrics, `criterion`, `train_value` and `predict`.

    Epoch values come from the metric objects alone, which sum over samples and over processes, so that uneven batches
    weigh what they should. They are part of the state dict: a run that goes on in the middle of an epoch loses nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Schedule | None,
        train_value_name: str,
        metrics: dict[str, dict[str, Metric]],
        l1: float,
        decay_norms_and_biases: bool,
    ) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.scheduler = scheduler
        self.l1 = l1
        self.decay_norms_and_biases = decay_norms_and_biases
        self._logging: list[Any] = []
        self._several = self._sync_batch_norm = False  # processes; norms that all of them share
        self._accumulates = False  # batches, before a step
        self.loss_weight: Tensor | float | None = None  # what the latest batch's loss is the mean over
        self._sharded = False
        self.train_metrics = EpochMeans(train_value_name)
        self.val_metrics = self._collection("val", metrics["val"])
        self.test_metrics = self._collection("test", metrics["test"])

    keeps_targets = True  # in their own format where the Trainer's precision is bf16-true or 16-true
    tests_any_split = True  # `test_step` measures what `validation_step` does: `eval split=val` may call it

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this one 44 times a step, and torch would look for parameters and modules each time.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @staticmethod
    def _collection(split: str, metrics: dict[str, Metric]) -> MetricCollection:
        loss: dict[str, Metric] = {"loss": MeanLoss()}
        # Macro F1, precision and recall count the same four numbers: one of them counts, the others share.
        shared = [name for name in metrics if name in ("f1", "precision", "recall")]
        groups = [[name] for name in loss | metrics if name not in shared] + ([shared] if shared else [])
        collection = MetricCollection({**loss, **metrics}, prefix=f"{split}_", compute_groups=groups)
        return collection

    # -- what a subclass says

    def criterion(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        """Mean loss of the batch (0-d), and its weight in the means over an epoch and over the processes."""
        raise NotImplementedError

    def train_value(self, output: Tensor, target: Tensor) -> Tensor:
        """What is counted in training beside the loss, of each sample [B]."""
        raise NotImplementedError

    def predict(self, output: Tensor) -> Tensor:
        """From the net's output to what a user reads: probabilities or values."""
        return output

    # -- steps

    def forward(self, x: Tensor) -> Tensor:
        """The net's output in float32 (float64 if the net is): losses and metrics lose too much in half precision."""
        x = x.to(self.dtype)  # batches are normalized after Lightning's own conversion for bf16-true and 64
        output: Tensor = self.net(x)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> dict[str, Tensor]:
        x, target = batch
        output = self(x)
        loss, weight = self.criterion(output, target)
        metrics.update(preds=output, target=target, value=loss, weight=weight)
        return {"output": output, "target": target}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._training_loss(batch, batch_idx)
        trainer, every = self.trainer, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        # Of the batches that one optimizer step accumulates, the last one's loss is logged.
        steps_now = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if every and (step + 1) % every == 0 and steps_now:
            self._log_loss(loss, step)
        return self._regularized(loss)

    # Lightning asks for the arguments of `training_step` at each step; so they need not be found anew.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def _training_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """The batch's mean loss, counted.

        Over several processes it is this one's share of the mean over the samples of all: what the strategies make of
        it, the mean over the processes, is then the loss of one process.
        """
        x, target = batch
        counts = len(target)
        if self._several and (sampler := self._sampler()) is not None:
            counts = min(counts, sampler.samples_in(batch_idx)[0])  # behind them stand repeated ones
            if counts < len(target) and self._sync_batch_norm:  # its statistics are of all processes, as the loss is
                x, target = x[:counts], target[:counts]
        output = self(x)
        if counts < len(target):
            output, target = output[: counts or None], target[: counts or None]
        loss, weight = self.criterion(output, target)
        if counts == 0:  # it only takes part in what the processes do together
            loss, weight = output.sum() * 0, weight * 0
        else:
            self.train_metrics.add(loss.detach(), weight, self.train_value(output.detach(), target))
        if self._several:
            loss, weight = self._share(loss, weight, batch_idx)
        if self._accumulates:
            self.loss_weight = weight
        return loss

    def _sampler(self) -> Any:
        """The train loader's, if it tells how many samples of a batch count."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        return sampler if hasattr(sampler, "samples_in") else None

    def _share(self, loss: Tensor, weight: Tensor | int, batch_idx: int) -> tuple[Tensor, Any]:
        """`loss` times the weight of this process's samples over the mean weight of a process's; and that mean."""
        sampler: Any = self._sampler()
        known = sampler is not None and not getattr(self.trainer.train_dataloader, "max_bad_files", 0)
        if isinstance(weight, int) and known:
            all_of_them = sampler.samples_in(batch_idx)[1] / sampler.world_size
            return loss if weight == all_of_them else loss * (weight / all_of_them), all_of_them
        if sampler is None and isinstance(weight, int):  # a loader of somebody's own
            return loss, weight
        weight = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
        mean = _mean_over_processes(weight)
        return loss * (weight / mean), mean

    def _log_loss(self, loss: Tensor, step: int) -> None:
        # self.log costs several times a small net's step, and keeps on costing in the steps without it.
        trainer = self.trainer
        detached = _mean_over_processes(loss.detach()) if self._several else loss.detach()
        for shown in (trainer.callback_metrics, trainer.progress_bar_metrics):
            shown["train_loss_step"] = detached  # type: ignore[assignment]
        values = {"epoch": trainer.current_epoch, "train_loss_step": detached.item()}
        for callback in self._logging:  # one row for all that is known of a step
            values |= callback.step_metrics(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def _regularized(self, loss: Tensor) -> Tensor:
        if self.l1:
            loss = loss + self.l1 * sum(
                _whole(p.abs().sum()) for _, p, decays in decayed_parameters(self.net) if decays
            )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Tensor | tuple[Tensor, ...] | list[Tensor], batch_idx: int = 0) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self.predict(self(x))

    def _log_epoch(self, metrics: MetricCollection | EpochMeans) -> None:
        # compute() has already joined the processes, uneven shards included; what sync_dist takes of equal numbers
        # only keeps Lightning from warning. Of the mean of three, the last bit could be another.
        self.log_dict(metrics.compute(), sync_dist=True, reduce_fx="max", prog_bar=True)
        metrics.reset()

    def on_train_epoch_end(self) -> None:
        self._log_epoch(self.train_metrics)

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()  # of a validation that was broken off

    def on_validation_epoch_end(self) -> None:
        self._log_epoch(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_epoch(self.test_metrics)

    def on_train_epoch_start(self) -> None:
        # Lightning leaves this hook out where a run goes on in the middle of an epoch: what was counted stays.
        self.train_metrics.reset()

    # -- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops what the metrics of an older version kept in the state dict."""
        for key in [key for key in checkpoint["state_dict"] if "_metrics." in key]:
            del checkpoint["state_dict"][key]

    # -- building

    def configure_callbacks(self) -> list[Callback]:
        """Where batches are accumulated, a step is the mean over all of their samples."""
        trainer: Any = self.trainer
        schedules = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
        self._accumulates = trainer.accumulate_grad_batches > 1 or schedules
        return [ExactMean()] if self._accumulates else []

    def configure_model(self) -> None:
        """Spreads the net over the processes for `trainer=fsdp`; called more than once, also on other strategies."""
        if self.device_mesh is not None and not self._sharded:
            from boltlab.strategies.fsdp import spread

            if self.trainer._accelerator_connector._layer_sync is not None:  # which Lightning heeds under DDP only
                self.net = synchronized(self.net, self.device_mesh.device_type)
            spread(self, self.trainer.strategy)  # type: ignore[arg-type]
            self._sharded = True

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        # A training_step of a subclass may log no row of its own: then they go on by themselves.
        rows = type(self).training_step is Task.training_step
        self._logging = [c for c in self.trainer.callbacks if rows and hasattr(c, "step_metrics")]  # type: ignore[attr-defined]
        for callback in self._logging:
            callback.on_train_batch_start = None  # it has nothing left to do there
        # Pretrained weights are fetched for a new training only: to load a trained run, nothing but its checkpoint is
        # needed. (Where a run is resumed, set trainer.ckpt_path: an argument of trainer.fit is not known yet here.)
        if hasattr(self.net, "load_pretrained") and self.trainer.ckpt_path is None:
            self.net.load_pretrained()  # type: ignore[operator]

    def on_train_start(self) -> None:
        self._several = self.trainer.world_size > 1
        self._sync_batch_norm = any(
            isinstance(module, (nn.SyncBatchNorm, CPUSyncBatchNorm)) for module in self.net.modules()
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.net, self.make_optimizer, self.scheduler, self.decay_norms_and_biases)
