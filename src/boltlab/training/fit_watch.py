"""The best checkpoint of a fit, and weights that a callback puts in place when training ends."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from boltlab.checkpoints.file import read, write
from boltlab.training.outcome import numbers


def best_callback(trainer: "pl.Trainer", monitor: str) -> ModelCheckpoint | None:
    """The ModelCheckpoint that has chosen a best file: the one of this metric, else the first that monitors one."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found = [c for c in found if c.monitor and c.best_model_path and c.best_model_score is not None]
    return min(found, key=lambda callback: callback.monitor != monitor, default=None)


def measured_rarely(trainer: "pl.Trainer") -> bool:
    """Whether what monitors a metric may be asked to act on a value of earlier weights, or on one for a second time."""
    if trainer.check_val_every_n_epoch != 1 or getattr(trainer, "val_check_interval", None) != 1.0:
        return True
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return any(c._every_n_epochs < 1 or c._save_on_train_epoch_end is not None for c in found)


class FitWatch(Callback):
    """Stands before all other callbacks. `replaced`: whether one of them has put other weights in place at the end of
    the training, as Lightning's StochasticWeightAveraging does; no checkpoint of the training holds them.

    record: of the run's data; each checkpoint waits for it.
    """

    def __init__(self, record: Any = None) -> None:
        self.replaced = False
        self._record = record
        self._trained: list[Tensor] = []

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        said = [uneven_windows(trainer, pl_module), lone_sample(trainer, pl_module)]
        if any(type(callback).__name__ == "Timer" for callback in trainer.callbacks):  # type: ignore[attr-defined]
            from boltlab.training.stopped import timed

            said.append(timed(trainer))
        for line in filter(None, said if trainer.is_global_zero else []):
            print(line, flush=True)

    def on_save_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: Any) -> None:
        if self._record is not None:
            self._record.wait()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        whole = not isinstance(trainer.strategy, ModelParallelStrategy)  # such callbacks take no sharded weights
        if whole and _may_replace(trainer):
            self._trained = [p.detach().cpu().clone() for p in pl_module.parameters()]

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        pairs = list(zip(self._trained, pl_module.parameters(), strict=False))
        self._trained = []
        changed = any(not torch.equal(before, now.detach().cpu()) for before, now in pairs)
        # One that averages adds an epoch of its own for the statistics of norms, and changes the weights before it.
        added = bool(pairs) and 0 <= (trainer.max_epochs or -1) < trainer.current_epoch
        self.replaced = bool(trainer.strategy.broadcast(changed or added))


def keep_replaced(
    trainer: "pl.Trainer", model: "pl.LightningModule", data: Any, folder: Path, monitor: str
) -> dict[str, float]:
    """Validates the weights that a callback has put in place and makes them the run's result: last and best checkpoint.

    They outrank the best epoch, for they are what the callback was asked for. A longer run continues from the weights
    that were trained, which stay in the last checkpoint.

    Returns:
        The metrics of the validation.
    """
    last, best = folder / "checkpoints" / "last.ckpt", best_callback(trainer, monitor)
    path = last if last.is_file() else best and Path(best.best_model_path)
    content = read(path) if path and trainer.is_global_zero else {}
    if trainer.strategy.broadcast(not content or "averaging_state" in content):
        return {}  # nothing is saved, or each checkpoint holds the average already
    metrics = _validated(trainer, model, data)
    value = metrics.get(best.monitor or "", math.nan) if best else math.nan
    if best and math.isfinite(value):
        best.best_model_score = torch.tensor(value)
    if trainer.is_global_zero:
        content.setdefault("current_model_state", content["state_dict"])
        content["state_dict"] = trainer.strategy.lightning_module_state_dict()
        for target in _saved(last, best):
            write(content, target)
        shown = f" ({best.monitor} {value:.4f})" if best and math.isfinite(value) else ""
        names = " or ".join(_may_replace(trainer))
        print(f"{names} replaced the weights when training ended: they are tested{shown}", flush=True)
    trainer.strategy.barrier()
    return metrics


def _saved(last: Path, best: ModelCheckpoint | None) -> set[Path]:
    found = {last} if last.is_file() else set()
    return found | {Path(best.best_model_path)} if best else found


def _validated(trainer: "pl.Trainer", model: "pl.LightningModule", data: Any) -> dict[str, float]:
    """The metrics of a validation; none where the run has none."""
    batches = trainer.num_val_batches
    if not sum(batches if isinstance(batches, list) else [batches]):
        return {}
    trainer.validate(model, datamodule=data, verbose=False)
    return numbers(trainer.callback_metrics)


def _may_replace(trainer: "pl.Trainer") -> list[str]:
    """Names of the callbacks that act at the end of a fit: this package's own, and those that save, change no weights
    there that they have not saved."""
    kinds = [type(c) for c in trainer.callbacks if not isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
    others = [kind for kind in kinds if not kind.__module__.startswith("boltlab.")]
    hooks = ("on_train_end", "on_fit_end")
    return [k.__name__ for k in others if any(getattr(k, hook) is not getattr(Callback, hook) for hook in hooks)]


def uneven_windows(trainer: "pl.Trainer", model: "pl.LightningModule") -> str | None:
    """Says so where accumulated batches weigh samples unequally, and nothing in the run sees to it."""
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if window == 1 or not model.automatic_optimization or not math.isfinite(batches):
        return None
    if any(getattr(callback, "weighs_windows", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    loader: Any = trainer.train_dataloader
    try:
        smaller = len(loader.dataset) % loader.batch_size and not getattr(loader, "drop_last", False)
    except (AttributeError, TypeError):  # several loaders, or one without a length
        smaller = False
    if not (batches % window or smaller):
        return None
    return (
        f"trainer.accumulate_grad_batches={window}: of {batches} batches an epoch, the last window has fewer samples"
        " but is divided as a full one. Where the loss is a mean over samples, callbacks=[default,exact_mean] weighs"
        " them equally"
    )


def lone_sample(trainer: "pl.Trainer", model: "pl.LightningModule") -> str | None:
    """Says so where a batch of a single sample comes before a batch norm, which needs two values of each channel."""
    loader: Any = trainer.train_dataloader
    try:
        size, samples = loader.batch_size * trainer.world_size, len(loader.dataset)
        last = samples % size or size
    except (AttributeError, TypeError):  # several loaders, or one without a length
        return None
    left_out = getattr(loader, "drop_last", False) or trainer.num_training_batches < samples / size
    norms = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if last != 1 or left_out or not norms:
        return None
    return (
        f"the last of the batches of {size} has 1 of the {samples} samples, too few for a batch norm of vectors:"
        " another data.batch_size, or drop_last=True in a DataLoader of your own"
    )
