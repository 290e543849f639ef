"""What a plain LightningModule needs beside its loaders to resume to the bit: when to save, what Lightning omits."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from boltlab import runs
from boltlab.callbacks.last import Last
from boltlab.data.samplers import random_key
from boltlab.training import lightning_private
from boltlab.training.draws import EVALUATION, HOOK, seed_all
from boltlab.training.loaders import Exact, Seam, flattened
from boltlab.training.module_state import ModuleState

KEY = "exact"  # in a checkpoint
_TRAIN_START, _EPOCH_START, _VAL_START, _VAL_END, _EPOCH_END = range(5)


class Resume(Callback):
    """The first of the callbacks.

    Draws: each step and each hook of an epoch begins with its own seeds, so no generator's state is saved.
    When: checkpoints are saved where all of a step is done: when the loader is asked for the next batch, before a
    validation that is due, and when the next epoch begins. `Last` marks them, and is called from here, before all other
    callbacks: what these do at such a place, they do again after a resume.
    What: sums of `self.log`, metrics, attributes, modes, frozen parameters, gradients that wait for a step.
    """

    def __init__(self, seam: Seam, folder: Path | None) -> None:
        self.seam, self.folder = seam, folder
        self._hooked = False
        self._restored: dict[str, Any] = {}  # of the checkpoint, until the first hook of the loop
        self._loader_states: list[dict[str, Any]] = []
        self._before: dict[str, Any] | None = None  # the state before the validation that is running
        self._epoch_ends = self._ending = self._adds = False

    # -- a fit begins

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if self._hooked or stage == "predict":
            return
        self._hooked = True
        lightning_private.check(trainer)
        fetches = "dataloader_iter" not in inspect.signature(pl_module.training_step).parameters
        before = self._between_batches if fetches else None
        if not fetches:  # the step itself asks for its batch
            self.on_train_batch_start = self._before_batch  # type: ignore[assignment, method-assign]
        lightning_private.around_fetches(trainer.fit_loop.epoch_loop, before, self._seed_step)
        for loop in lightning_private.evaluation_loops(trainer):
            lightning_private.around_fetches(loop, None, partial(self._seed_evaluation, loop))
        if trainer.world_size > 1:
            self.on_validation_batch_end = self.on_test_batch_end = self._float_counts  # type: ignore[method-assign]
        for owner in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
            self.seam.seed_making(owner)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.state = ModuleState(pl_module)
        self._lasts = [c for c in trainer.callbacks if isinstance(c, Last)]  # type: ignore[attr-defined]
        for last in self._lasts:
            last.called = True

    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            self._restored = checkpoint.get(KEY, {})
            if not self._restored:
                self.seam.cannot("resumed without the state of module and epoch: changed settings, or an older version")
            self._loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._report(trainer)
        self._hand_loaders_their_state(trainer)
        self._know_metrics(trainer, pl_module)
        self._seed(_TRAIN_START)

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._know_metrics(trainer, pl_module)  # where nothing was left to train

    def _know_metrics(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Adds the checkpoint's value of what was not measured since."""
        for name, value in self._restored.get("metrics", {}).items():
            trainer.callback_metrics.setdefault(name, value.to(pl_module.device))

    def _report(self, trainer: "pl.Trainer") -> None:
        if not hasattr(trainer, "val_check_interval"):  # Lightning leaves it out where it is a time
            self.seam.cannot("trainer.val_check_interval is a time: validations follow the clock")
        known = runs.read_summary(self.folder) if self.folder else {}
        if known.get("exact") is False:  # of an earlier part of this run
            self.seam.reasons.insert(0, str(known.get("exact_reason")))
        self._tell(trainer)
        self.seam.tell = partial(self._tell, trainer)
        processes = self.seam.shares[0]
        for loader in flattened(trainer.train_dataloader) if processes > 1 and trainer.is_global_zero else ():
            if isinstance(loader, Exact) and isinstance(size := getattr(loader, "batch_size", None), int):
                print(f"batch_size {size} on each of {processes} processes, {size * processes} together", flush=True)

    def _tell(self, trainer: "pl.Trainer", *new: str) -> None:
        if not trainer.is_global_zero:
            return
        reasons = list(dict.fromkeys(self.seam.reasons))
        for reason in new or reasons:
            print(f"an interrupted run will not resume to the bit: {reason}", flush=True)
        if self.folder is not None and self.folder.is_dir() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            runs.write_summary(self.folder, exact=not reasons, exact_reason="; ".join(reasons) or None)

    def _hand_loaders_their_state(self, trainer: "pl.Trainer") -> None:
        stateful = [loader for loader in flattened(trainer.train_dataloader) if hasattr(loader, "load_state_dict")]
        again = False
        for loader, state in zip(stateful, self._loader_states, strict=False):
            if isinstance(loader, Exact):
                again |= loader.resume_later(state)
        lightning_private.hand_loaders_their_state(trainer, again)
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            lightning_private.loaded_in(trainer, self.seam.made_in())
        self._loader_states = []

    # -- between the steps

    def _between_batches(self) -> None:
        trainer = self.seam.trainer
        self._settle(trainer)
        if self._adds:  # here, for a validation puts back what the connector knew before it
            lightning_private.not_the_first_batch(trainer)
        self._before, self._adds = None, False
        for last in self._lasts:
            last.between_batches(trainer)

    def _before_batch(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Where the step itself asks for its batch: nothing of it is done, but Lightning has counted it."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        for counted in (progress.current, progress.total):
            counted.ready -= 1
        try:
            self._between_batches()
        finally:
            for counted in (progress.current, progress.total):
                counted.ready += 1

    def _settle(self, trainer: "pl.Trainer") -> None:
        """Puts back what the checkpoint holds, after all that modules and callbacks do when a training begins."""
        restored, self._restored = self._restored, {}
        if not restored:
            return
        shares = restored["processes"]
        if len(shares) != trainer.world_size:
            self.seam.cannot(f"resumed on {trainer.world_size} processes instead of {len(shares)}")
            return
        mine = shares[trainer.global_rank]
        self.state.restore(mine["module"], lightning_private.training_modes(trainer) if trainer.validating else None)
        lightning_private.restore_logged_sums(trainer, self.state.module, mine["sums"])
        self._adds = bool(mine["sums"])
        if (ended := restored.get("ended")) is not None:
            lightning_private.end_epoch(trainer, ended)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._settle(trainer)
        self._before, self._epoch_ends, self._ending = None, False, False
        for last in self._lasts:
            last.save_due(trainer)
        self._seed(_EPOCH_START)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._settle(trainer)
        if trainer.world_size > 1:  # a checkpoint holds the norms of rank 0; DDP may be told not to send them around
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._before = self.state.capture(lightning_private.training_modes(trainer))
        for last in self._lasts:
            last.before_validation(trainer)
        self._seed(_VAL_START)

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "fit":
            self._seed(_VAL_END)

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._before is not None:  # what is saved from here on is behind the validation
            loop = trainer.fit_loop.epoch_loop.val_loop
            now = self.state.capture(lightning_private.training_modes(trainer))
            self._before = self.state.mixed(now, self._before, lightning_private.logged_metrics(loop))

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._settle(trainer)
        self._before, self._epoch_ends = None, True
        for last in self._lasts:
            last.before_epoch_end(trainer)
        self._ending = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        # Lightning steps no plateau scheduler at the end of an epoch that was resumed.
        trainer.fit_loop.restarting = False
        self._seed(_EPOCH_END)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._ending = False
        for last in self._lasts:
            last.save_due(trainer)

    # -- draws

    def _seed(self, hook: int) -> None:
        fit = self.seam.trainer.fit_loop
        self._seed_all(HOOK, hook, fit.epoch_progress.current.processed, 1 + fit.total_batch_idx)

    def _seed_step(self) -> None:
        loop = self.seam.trainer.fit_loop
        seed = random_key(self.seam.seed, self.seam.shares[1])
        key = random_key(seed, self.seam.trainer.current_epoch, loop.epoch_loop.batch_progress.current.ready)
        seed_all(key, self.seam.trainer.strategy.root_device)

    def _seed_evaluation(self, loop: Any) -> None:
        self._seed_all(EVALUATION, self.seam.epoch("val"), loop.batch_progress.current.ready)

    def _seed_all(self, kind: int, *numbers: int) -> None:
        key = self.seam.key(kind, self.seam.shares[1], *numbers)
        seed_all(key, self.seam.trainer.strategy.root_device)

    # -- means over processes

    def _float_counts(self, trainer: "pl.Trainer", *_: Any, **__: Any) -> None:
        for loop in lightning_private.evaluation_loops(trainer):
            lightning_private.float_counts(loop)

    # -- checkpoints

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        loops = checkpoint["loops"]["fit_loop"]
        _finish(loops["epoch_loop.batch_progress"])
        _finish(loops["epoch_progress"])
        ahead = lightning_private.fetched_ahead(trainer)
        for state in loops["state_dict"].get("combined_loader", []):
            if ahead and "delivered" in state:
                state["delivered"] = max(0, state["delivered"] - ahead)
        module = self.state.capture() if self._before is None else self._before
        sums = [] if self._epoch_ends else lightning_private.logged_sums(trainer)
        mine = {"module": module, "sums": sums}
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        # A ModelCheckpoint saves before Lightning has done all of an epoch's end.
        ended = sorted(lightning_private.logged_metrics(trainer.fit_loop.epoch_loop)) if self._ending else None
        checkpoint[KEY] = {"processes": _of_all_processes(trainer, mine), "metrics": metrics, "ended": ended}


def _finish(progress: dict[str, Any]) -> None:
    """Takes back the beginning of a batch or an epoch of which nothing was done."""
    for counted in (progress["current"], progress["total"]):
        if counted["ready"] == counted["processed"] + 1 and counted["started"] == counted["processed"]:
            counted["ready"] = counted["processed"]


def _of_all_processes(trainer: "pl.Trainer", mine: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [mine]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, mine)
    return found
