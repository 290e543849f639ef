"""checkpoints/last.ckpt: the newest state, from which a run resumes exactly; also written when it is stopped."""

import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging

from boltlab.ground import signals
from boltlab.ground.errors import UserError, WorkerError

_ASK_SECONDS = 0.5  # how often the processes of a run ask one another


class Last(Checkpoint):
    """Saves at the end of each ``every_n_epochs``-th epoch and of the run; in mid-epoch every ``every_n_train_steps``
    optimizer steps or ``every_n_minutes``; and where a signal asks for it (see `boltlab.ground.signals`).

    Whatever the monitored metric does, the file is the newest state. ``keep_last`` files are kept: ``last.ckpt``, and
    before it ``last-1.ckpt``, ``last-2.ckpt``, …

    It saves where Lightning can go on from without losing or repeating anything: after an optimizer step, not within
    accumulated batches; before a validation that is due, which is then run from its start; at an epoch's end. (Its own
    checkpoint of an epoch's last batch would leave out the validation.) Several processes agree on the step. Where a
    single process is told to stop, or loses a data worker, while it waits for a batch, the steps before are saved.

    Its hooks mark what is due. `training.resume_state` calls the methods that save, where all of a step is done: a
    callback's own on_train_batch_end comes before the module's, and before the row of the step is logged.

    Raises:
        Stopped: the run was told to stop, and is saved.
        UserError: the Trainer is none of boltlab's, so that nothing would be saved.
    """

    called = False  # whether `training.resume_state` is there

    def __init__(
        self,
        dirpath: str | Path,
        every_n_epochs: Annotated[int, Ge(1)] = 1,
        every_n_train_steps: Annotated[int, Ge(1)] | None = None,
        every_n_minutes: Annotated[float, Gt(0)] | None = None,
        keep_last: Annotated[int, Ge(1)] = 1,
    ) -> None:
        self.dirpath = Path(dirpath)
        self.path = self.dirpath / "last.ckpt"
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.every_n_minutes, self.keep_last = every_n_minutes, keep_last
        self._step = 0  # of the newest checkpoint
        self._written = 0.0  # when, of time.monotonic
        self._stops = False  # whether early stopping has ended the training
        self._due = False  # at the next place where it can be saved
        self._before_validation = self._in_validation = self._in_epoch = False
        self._stopping = 0  # the signal that is obeyed when the step is saved
        self._ask_in, self._asked, self._stride = 1, 0.0, 1

    # -- when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.called:
            raise UserError("callbacks.last saves in the Trainer of boltlab train only; Lightning has ModelCheckpoint")
        trainer.should_stop = self._stops  # a run that early stopping had ended trains no further

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._written = trainer.global_step, time.monotonic()
        self._ask_in, self._asked, self._stride = 1, time.monotonic(), 1
        signals.inbox.deferred = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop, save = self._told(trainer)
        step, every = trainer.global_step, self.every_n_train_steps
        if every and step // every > self._step // every:
            save = True
        if stop or save or self._due or step == trainer.max_steps:
            self._due, self._stopping = True, stop

    def between_batches(self, trainer: Trainer) -> None:
        """Saves what is due, when all of a step is done."""
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if self._due and begun and self._can_save(trainer):
            self._save(trainer)
            self._stop(self._stopping)

    def _can_save(self, trainer: Trainer) -> bool:
        """Whether, after a batch, Lightning can go on from here."""
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return False
        return not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def before_validation(self, trainer: Trainer) -> None:
        """Saves what is due; the validation is run from its start after a resume."""
        stop, save = self._told(trainer)
        if (stop or save or self._due) and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save(trainer, before_validation=True)
            self._stop(stop)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        stop, save = self._told(trainer)
        self._due |= save
        if stop and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save_in_validation(trainer, pl_module)
            self._stop(stop)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_validation = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_validation = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not whole and trainer.global_step == trainer.max_steps:
            return  # saved where it was: a longer run resumes in the middle of the epoch
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        ends |= trainer.global_step == trainer.max_steps
        if self._due or ends or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._stops, self._due = trainer.should_stop, True

    def save_due(self, trainer: Trainer) -> None:
        """Saves what is due, when all of an epoch is done."""
        if self._due:
            self._save(trainer)

    def before_epoch_end(self, trainer: Trainer) -> None:
        """Saves where `max_steps` ends a run in mid-epoch, before the hooks of an epoch's end."""
        if trainer.global_step == trainer.max_steps and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._in_epoch = True
            try:
                self._save(trainer)
            finally:
                self._in_epoch = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ask_in = 1
        told = self._told(trainer)[0]
        signals.inbox.deferred = False  # from here on a signal raises by itself
        self._stop(told or (signals.inbox.stop if trainer.world_size == 1 else 0))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.path.exists() and trainer.global_step:  # killed between its last two files, nothing left to train
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        signals.inbox.deferred = False
        if isinstance(exception, (signals.Stopped, WorkerError)) and trainer.world_size == 1:
            self._save_between_batches(trainer, pl_module)

    def _told(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that asks for an end (0: none), and whether a checkpoint is due by the clock or by a signal.

        Several processes ask one another every half a second or so, after a number of steps that they have agreed on:
        they must act at the same one.
        """
        box = signals.inbox
        if trainer.world_size == 1 and not (box.stop or box.save or self.every_n_minutes):
            return 0, False
        now = time.monotonic()
        save = box.save or bool(self.every_n_minutes and now - self._written >= 60 * self.every_n_minutes)
        if trainer.world_size == 1:
            box.save = False
            return box.stop, save
        self._ask_in -= 1
        if self._ask_in > 0:
            return 0, False
        here = [box.stop, save, (now - self._asked) / self._stride]
        told = torch.tensor(here, device=trainer.strategy.root_device, dtype=torch.float)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        stop, any_save, seconds_per_step = told.tolist()
        self._stride = self._ask_in = max(1, min(1000, int(_ASK_SECONDS / max(seconds_per_step, 1e-6))))
        self._asked, box.save = now, False
        return int(stop), bool(any_save)

    def _stop(self, signum: int) -> None:
        if signum:
            signals.inbox.deferred = False
            raise signals.Stopped(signum)

    # -- what

    def _save(self, trainer: Trainer, before_validation: bool = False) -> None:
        self._due = False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            self._keep_older()
        self._before_validation = before_validation
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._before_validation = False
        self._step, self._written = trainer.global_step, time.monotonic()

    def _save_in_validation(self, trainer: Any, pl_module: LightningModule, at_exception: bool = False) -> None:
        for callback in trainer.callbacks:
            # The weights have changed places for the validation; what acts on exceptions has put them back by now.
            put_back = at_exception and type(callback).on_exception is not Callback.on_exception
            if isinstance(callback, WeightAveraging) and not put_back:
                callback.on_validation_epoch_end(trainer, pl_module)
        self._save(trainer, before_validation=True)

    def _save_between_batches(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was trained since the newest checkpoint, where the run ends while it waits for a batch."""
        loop = trainer.fit_loop.epoch_loop
        nothing_new = trainer.sanity_checking or trainer.global_step == self._step
        if trainer.state.fn != "fit" or nothing_new or loop._should_accumulate():
            return
        batches = loop.batch_progress.current
        if self._in_validation:
            self._save_in_validation(trainer, pl_module, at_exception=True)
        elif trainer.training and batches.ready == batches.completed > 0 and self._can_save(trainer):
            self._save(trainer)

    def _keep_older(self) -> None:
        files = [self.path, *(self.path.with_stem(f"last-{n}") for n in range(1, self.keep_last))]
        for older, newer in reversed(list(zip(files[1:], files, strict=False))):
            if newer.exists():
                beside = older.with_name(f".{older.name}.{secrets.token_hex(4)}")
                try:
                    os.link(newer, beside)  # at no time is there no `newer`
                except OSError:  # a file system without links
                    shutil.copyfile(newer, beside)
                beside.replace(older)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._before_validation:
            # As if nothing of the validation had been run, in the one form that makes Lightning run it.
            nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            begun = {**nothing, "ready": 1, "started": 1}
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress.update(total=begun, current=nothing, is_last_batch=False)
        if self._in_epoch:
            for counted in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counted["processed"] -= 1

    def state_dict(self) -> dict[str, Any]:
        return {"stops": self._stops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stops = state_dict["stops"]
