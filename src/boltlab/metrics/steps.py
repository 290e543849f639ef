"""What a training step logs, and its loss as a mean over the samples of all processes."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


def log_step(module: LightningModule, batch_idx: int, **values: Tensor) -> None:
    """Logs values of a training step every `log_every_n_steps`, as `self.log(…, prog_bar=True, sync_dist=True)` does.

    That costs several times a small net's step, and keeps on costing in the steps without it; this costs nothing there.
    Of the batches that one optimizer step accumulates, the last one's values are logged.
    """
    trainer: Any = module.trainer
    every, step = trainer.log_every_n_steps, trainer.global_step
    if not every or (step + 1) % every:
        return
    if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
        return
    logged = {name: _mean_over_processes(value.detach()) for name, value in values.items()}
    for shown in (trainer.callback_metrics, trainer.progress_bar_metrics):
        shown.update(logged)
    row = {"epoch": trainer.current_epoch, **{name: value.item() for name, value in logged.items()}}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=step)


def counted(module: LightningModule, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, int]:
    """(x [B, …], target [B], how many of the samples, the first ones, count in a training step).

    All do, except on several processes: of the last batch of an epoch `boltlab.data.Loader` gives a process fewer, or
    none, and repeats others behind its own.
    """
    x, target = batch
    sampler = _sampler(module) if _several() else None
    if sampler is None:
        return x, target, len(target)
    counts = min(len(target), sampler.samples_in(batch_idx)[0])
    norms = module.modules() if counts < len(target) else ()
    if any(isinstance(norm, nn.SyncBatchNorm) or hasattr(norm, "of_all_processes") for norm in norms):
        return x[:counts], target[:counts], counts  # their statistics are of all processes, as the loss is
    return x, target, counts


def share(module: LightningModule, loss: Tensor, weight: Tensor | int, batch_idx: int) -> tuple[Tensor, Any]:
    """`loss` times the weight of this process's samples over the mean weight of a process's; and that mean.

    The strategies take the mean over the processes: of these losses it is the mean over the samples of all of them.
    weight: what the loss, 0-d, is a mean over; 0 where no sample of this process counts.
    """
    if not _several():
        return loss, weight
    sampler = _sampler(module)
    if isinstance(weight, int):
        if sampler is None:  # a loader of somebody's own
            return loss, weight
        if not getattr(module.trainer.train_dataloader, "max_bad_files", 0):
            all_of_them = sampler.samples_in(batch_idx)[1] / sampler.world_size
            return loss if weight == all_of_them else loss * (weight / all_of_them), all_of_them
    weight = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
    mean = _mean_over_processes(weight)
    return loss * (weight / mean), mean


def _several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _sampler(module: LightningModule) -> Any:
    """The train loader's, if it tells how many samples of a batch count."""
    sampler = getattr(module.trainer.train_dataloader, "sampler", None)
    return sampler if hasattr(sampler, "samples_in") else None


def _mean_over_processes(value: Tensor) -> Tensor:
    if not _several():
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
