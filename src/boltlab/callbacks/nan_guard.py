"""Stops a run whose loss or weights are no longer finite, before a checkpoint is made of them; or skips such steps."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from boltlab.checkpoints.file import write
from boltlab.ground.errors import NonFiniteLoss, UserError
from boltlab.ground.files import write_json

_GRADIENT = "a gradient is not finite"
# Of a training that skips steps, of one whose losses are read at once, and of any other.
_HOOKS = {
    "skips": {"on_train_batch_start", "on_before_backward", "on_before_optimizer_step"},
    "reads": {"on_before_backward"},
    "waits": {"on_train_batch_end"},
}


class Found(NamedTuple):
    """What is not finite, after how many steps; the batches of that step it may come from, where that is known."""

    what: str
    step: int
    epoch: int
    batches: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.batches:
            return f"{self.what} after step {self.step} (epoch {self.epoch}, from 0)"
        batches = ", ".join(map(str, self.batches))
        return f"{self.what} at step {self.step} (epoch {self.epoch}, batch {batches}, both from 0)"


class NaNGuard(Callback):
    """Looks at the training loss, and at the weights before they are saved.

    On one CPU process it looks at each loss before the backward pass, so the weights are still good when it stops.
    Reading a value from an accelerator waits for it, and processes must agree before they stop, so there the
    losses are kept and looked at together, every ``every_n_steps`` steps. Whatever is pending is looked at before
    validation and before any checkpoint.

    With ``skip_steps`` up to so many steps whose loss or gradient is not finite are left out: weights, the optimizer's
    state, the running statistics of norms and the epoch's means are those from before. The step still counts, in
    global_step and in the schedule of the learning rate, so the training ends where it would have. Each step then
    waits for the accelerator and for the other processes. precision=16-mixed finds its scale by steps with infinite
    gradients, which its scaler leaves out by itself: there only the losses are looked at.

    dir: gets `samples.json` (what was found, which samples of the train split, by file where they are files),
        `batch.pt` (x and y as the loader gives them, made again) and, where the weights were good when it was found,
        `state.ckpt` (weights and optimizer state before the step; running statistics have seen the batch). Over several
        processes the first two carry the rank in their names.

    Raises:
        NonFiniteLoss: on all processes, at the same step.
    """

    def __init__(
        self, every_n_steps: Annotated[int, Ge(1)] = 10, skip_steps: Annotated[int, Ge(0)] = 0, dir: str | None = None
    ) -> None:
        self.every_n_steps = every_n_steps
        self.skip_steps = skip_steps
        self.dir = None if dir is None else Path(dir)
        self.skipped: list[int] = []  # the steps, as the messages number them
        self._pending: list[tuple[Tensor, int, int, int]] = []  # loss, step, epoch, batch
        self._losses: list[Tensor] = []  # of the batches that one step accumulates
        self._before: tuple[list[tuple[Tensor, Tensor]], Any] = ([], None)
        self._saved_step = 0
        self._ending = False

    def run_summary(self) -> dict[str, Any]:
        """Values for the summary of the run."""
        return {"skipped_steps": len(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = list(state_dict.get("skipped", []))

    @staticmethod
    def _reads_freely(trainer: Trainer) -> bool:
        return trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        free = self._reads_freely(trainer)
        self._saved_step, self._ending = trainer.global_step, False
        self._pending, self._losses = [], []
        used = _HOOKS["skips" if self.skip_steps else "reads" if free else "waits"]
        for name in set.union(*_HOOKS.values()):  # Lightning passes over a hook that cannot be called
            vars(self).pop(name, None)
            if name not in used:
                setattr(self, name, None)

    # -- looking before the step is taken

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            means: Any = getattr(pl_module, "train_metrics", None)
            marked = means.mark() if hasattr(means, "mark") else None
            self._before = [(buffer, buffer.clone()) for buffer in pl_module.buffers()], marked

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.skip_steps:
            self._losses.append(loss.detach())
        elif not math.isfinite(loss.item()):
            self._stop(trainer, _found_step(trainer, [loss], []), before=True)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [grad for p in parameters if (grad := _own_part(p.grad)).numel()]
        good = [loss.isfinite() for loss in losses]
        if gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
            good.append(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())
        if self._all_agree(trainer, not good or bool(torch.stack(good).all())):
            return
        found = self._if_first(trainer, _found_step(trainer, losses, good))
        for p in parameters:
            p.grad = None  # optimizers pass over such a parameter: no update, no momentum, no decay
        self._restore(pl_module)
        if len(self.skipped) >= self.skip_steps:
            self._stop(trainer, found, before=True)
        self.skipped.append(trainer.global_step + 1)
        if found is not None:
            text = self._record(trainer, found, before=True)
            warnings.warn(f"skipped ({len(self.skipped)} of at most {self.skip_steps}): {text}", stacklevel=2)
        elif trainer.is_global_zero:
            self._keep_state(trainer)

    def _restore(self, pl_module: Any) -> None:
        """Buffers and the means of the epoch as they were before the step."""
        buffers, marked = self._before
        for buffer, content in buffers:
            buffer.copy_(content)
        if marked is not None:
            pl_module.train_metrics.back(marked)

    # -- looking afterwards

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._pending.append((loss.detach(), trainer.global_step, trainer.current_epoch, batch_idx))
        if (batch_idx + 1) % self.every_n_steps == 0:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skipped and trainer.is_global_zero:
            steps = ", ".join(map(str, self.skipped[:10])) + (", …" if len(self.skipped) > 10 else "")
            count = f"{len(self.skipped)} of at most {self.skip_steps}"
            print(f"{count} steps were skipped, not finite: {steps}", flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Raising here leaves the files of earlier checkpoints as they are: this one has not been opened yet.
        self._look(trainer)
        # A finite loss can have gradients that are not. save_weights_only checkpoints do not come by here.
        found = None
        for what, part in (("weights are", "state_dict"), ("the optimizer's state is", "optimizer_states")):
            if not _finite(checkpoint.get(part, {})):
                found = found or Found(f"{what} not finite", trainer.global_step, trainer.current_epoch)
        self._stop_together(trainer, found)
        self._saved_step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ending = True  # the other processes may be elsewhere: ask them nothing any more
        if isinstance(exception, NonFiniteLoss):
            for callback in trainer.checkpoint_callbacks:  # they come after this callback
                if hasattr(callback, "save_on_exception"):
                    callback.save_on_exception = False

    def _look(self, trainer: Trainer) -> None:
        pending, self._pending = self._pending, []
        values = torch.stack([loss for loss, *_ in pending]).tolist() if pending else []
        found = [
            Found(f"the training loss is {value}", step, epoch, (batch,))
            for value, (_, step, epoch, batch) in zip(values, pending, strict=True)
            if not math.isfinite(value)
        ]
        self._stop_together(trainer, found[0] if found else None)

    # -- stopping

    def _all_agree(self, trainer: Trainer, good: bool) -> bool:
        if trainer.world_size == 1 or self._ending:
            return good
        return trainer.strategy.reduce_boolean_decision(good, all=True)

    def _if_first(self, trainer: Trainer, found: Found | None) -> Found | None:
        """What was found here, unless it follows from what another process found: averaged gradients spread it."""
        if trainer.world_size == 1 or self._ending:
            return found
        all_found: list[Found | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(all_found, found)
        first = min((other.step, other.what == _GRADIENT) for other in all_found if other is not None)
        return found if found is not None and (found.step, found.what == _GRADIENT) == first else None

    def _stop_together(self, trainer: Trainer, found: Found | None) -> None:
        """Raises on every process if something was found on one."""
        if not self._all_agree(trainer, found is None):
            self._stop(trainer, self._if_first(trainer, found), before=False)

    def _stop(self, trainer: Trainer, found: Found | None, before: bool) -> None:
        text = None if found is None else self._record(trainer, found, before)
        if found is None and before and trainer.is_global_zero:
            self._keep_state(trainer)
        if trainer.world_size > 1 and not self._ending:  # all of them are here: each tells what one of them found
            texts: list[str | None] = [None] * trainer.world_size
            torch.distributed.all_gather_object(texts, text)
            named = [f"{text} (process {rank})" for rank, text in enumerate(texts) if text]
            text = named[0]
        if self.skip_steps:
            text = f"more than callbacks.nan_guard.skip_steps={self.skip_steps} steps are not finite: {text}"
        raise NonFiniteLoss(
            f"{text}. Training stops; the checkpoints hold the weights from before (step {self._saved_step} is the"
            " newest). What often helps: a smaller optimizer.lr, trainer.gradient_clip_val=1, precision=32;"
            " trainer.detect_anomaly=true names the operation; callbacks.nan_guard.skip_steps=N skips up to N steps."
        )

    def _record(self, trainer: Trainer, found: Found, before: bool) -> str:
        """Writes down what was found on this process; returns it as a text."""
        indices, files = _samples(trainer, found)
        text = str(found)
        if indices:
            names = [str(i) for i in indices[:8]] if files is None else files[:3]
            more = f" and {len(indices) - len(names)} more" if len(indices) > len(names) else ""
            text += f", samples {', '.join(names)}{more} of the train split"
        if before and not _finite(list(trainer.lightning_module.parameters())):
            text += "; the weights were not finite before it, an earlier gradient was not"
        if self.dir is None:
            return text
        end = "" if trainer.world_size == 1 else f"_rank{trainer.global_rank}"
        path = self.dir / f"samples{end}.json"
        record = found._asdict() | {"indices": indices, "files": files, "newest_checkpoint_step": self._saved_step}
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            write_json(path, [*records, record])
            if indices:
                x, y, _ = trainer.train_dataloader.dataset[found.epoch, torch.tensor(indices)]  # type: ignore[union-attr]
                write({"x": x, "y": y}, self.dir / f"batch{end}.pt")
            if before and trainer.is_global_zero:
                self._keep_state(trainer)
            text += f"; kept in {self.dir}"
        except (OSError, ValueError, UserError) as e:  # it must not hide what was found
            text += f"; not kept: {e}"
        return text

    def _keep_state(self, trainer: Trainer) -> None:
        shards = any(hasattr(p, "to_local") for p in trainer.lightning_module.parameters())
        if self.dir is None or shards:  # each process has its own
            return
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        weights = trainer.strategy.lightning_module_state_dict()
        weights = {key: value for key, value in weights.items() if "_metrics." not in key}  # they have counted the step
        write({"state_dict": weights, "optimizer_states": optimizers}, self.dir / "state.ckpt")


def _found_step(trainer: Trainer, losses: list[Tensor], good: list[Tensor]) -> "Found | None":
    """What is not finite in the losses of a step, or in its gradients; None where that is on another rank."""
    last, step, epoch = trainer.fit_loop.batch_idx, trainer.global_step + 1, trainer.current_epoch
    batches = range(last - len(losses) + 1, last + 1)
    for loss, batch in zip(losses, batches, strict=True):
        if not math.isfinite(value := loss.item()):
            return Found(f"the training loss is {value}", step, epoch, (batch,))
    return None if bool(torch.stack(good).all()) else Found(_GRADIENT, step, epoch, tuple(batches))


def _samples(trainer: Trainer, found: Found) -> tuple[list[int] | None, list[str] | None]:
    """Indices in the train split and files of the samples of this process; None where they cannot be known."""
    sampler: Any = getattr(trainer.train_dataloader, "sampler", None)
    if not hasattr(sampler, "batch_indices") or not found.batches:
        return None, None
    indices = torch.cat([sampler.batch_indices(found.epoch, batch) for batch in found.batches]).tolist()
    data = trainer.datamodule.dataset("train") if hasattr(trainer.datamodule, "dataset") else None  # type: ignore[attr-defined]
    files = getattr(data, "files", None)
    if files is None or len(files) != sampler.size:  # a cache in memory leaves unreadable files out
        return indices, None
    return indices, [files[i] for i in indices]


def _own_part(tensor: Any) -> Tensor:
    """A sharded tensor's own part."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def _finite(state: Any) -> bool:
    tensors = [_own_part(t) for t in tree_leaves(state) if isinstance(t, Tensor) and t.is_floating_point()]
    return bool(torch.stack([t.isfinite().all().cpu() for t in tensors]).all()) if tensors else True
