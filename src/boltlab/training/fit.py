"""Fits and tests in each process of a training.

From the command to the last checkpoint:

    commands.train.main     reads the command line, composes and checks the config
    start.Start             plans the run: new, or resumed from its newest checkpoint
    Start.execute           writes config and environment into the run folder
    processes.launch        starts `fit` once in each process
        fit                 seed; build data module and module; make the Trainer
            trainer.fit     for each epoch, for each batch of training.loaders: seed its draws, step, callbacks;
                            validate; callbacks.last and best write checkpoints
            trainer.test    the best checkpoint, or the last weights
    Start.execute           prints what the run has reached
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.ground import credentials, signals
from boltlab.ground.errors import ConfigError, DataError
from boltlab.ground.signals import Stopped
from boltlab.runs import checkpoints
from boltlab.training import resume
from boltlab.training.fit_watch import FitWatch, best_callback, keep_replaced
from boltlab.training.load import fitted
from boltlab.training.outcome import numbers, tell_loggers
from boltlab.training.plain import lacks
from boltlab.training.trainer import make_trainer


def fit(folder_name: str, config: DictConfig) -> None:
    """Entry point of each process: trains from the folder's newest checkpoint, then tests."""
    folder = Path(folder_name)
    with signals.caught(at_once=lambda signum: runs.end(folder, status="interrupted")):
        pl.seed_everything(config.seed, verbose=False)
        training: _Training | None = None
        try:
            training = _Training(folder, config)
            training.fit()
        except (ConfigError, DataError, MisconfigurationException):
            if training is None or not training.trainer.fit_loop.epoch_progress.current.ready:
                (folder / runs.UNBEGUN).touch()
            raise
        training.finish(training.test())


class _Training:
    """The training of one run in this process."""

    def __init__(self, folder: Path, config: DictConfig) -> None:
        self.folder, self.config, self.began = folder, config, time.perf_counter()
        self.data, self.model = build(config, "data"), build(config, "model")
        self.last = folder / "checkpoints" / "last.ckpt"
        self.newest, _ = checkpoints.newest_good(folder)
        self._give_state()
        adapt = None if self.newest is None else partial(resume.adapt, config=config, data=self.data)
        self.trainer: Any = make_trainer(config, adapt)
        self.leads = self.trainer.is_global_zero  # writes into the folder
        self.record = self._record_of_data() if self.leads else None
        self.watch = FitWatch(self.record)
        self.trainer.callbacks.insert(0, self.watch)
        if self.newest is not None:  # before the weights are loaded: float64 ones would be rounded
            self.model = self.trainer.precision_plugin.convert_module(self.model)

    def _record_of_data(self) -> "resume.DataRecord | None":
        if self.config.get("data_fingerprint") == "none":
            return None
        record = resume.DataRecord(self.folder, self.config, self.data, goes_on=self.newest is not None)
        self.data.on_load = record
        return record

    def _give_state(self) -> None:
        """Weights of `init_from`, and what the data module of a run that resumes has fitted."""
        if self.newest is None:
            if self.config.get("init_from"):
                from boltlab.training import init_from

                init_from.initialize(self.model, self.config, self.folder)
        elif hasattr(self.data, "fitted"):  # before Lightning, which restores it after it was fitted anew
            content = torch.load(self.newest, map_location="cpu", weights_only=True, mmap=True)
            self.data.load_state_dict({"fitted": fitted(content)})

    def fit(self) -> None:
        trainer, folder = self.trainer, self.folder
        if self.leads:
            self._check_folders()
        for logger in trainer.loggers:
            logger.log_hyperparams(credentials.plain(self.config))
        if self.leads:
            print(f"{runs.shown(folder)}\n", flush=True)
        trainer.ckpt_path = self.newest and str(self.newest)  # not as an argument of fit, so that `setup` knows it
        try:
            trainer.fit(self.model, datamodule=self.data)
        except Stopped:
            if self.leads:
                runs.write_summary(folder, epochs=trainer.current_epoch, steps=trainer.global_step)
            raise
        trainer.ckpt_path = None
        final = numbers(trainer.callback_metrics)
        if self.watch.replaced:
            final |= keep_replaced(trainer, self.model, self.data, folder, self.config.monitor)
        if self.leads:
            self._record(final)

    def _check_folders(self) -> None:
        needed = sum(p.nbytes for p in self.model.parameters())
        for callback in () if self.trainer.fast_dev_run else self.trainer.checkpoint_callbacks:
            checkpoint_file.check_folder(Path(callback.dirpath or self.folder), needed)

    def _record(self, final: dict[str, float]) -> None:
        """Writes what is known when training has ended; a run that only had to be tested keeps what it knew."""
        trainer, folder, before = self.trainer, self.folder, runs.read_summary(self.folder)
        parameters = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
        values: dict[str, Any] = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        values |= {"parameters": parameters, "processes": trainer.world_size}
        if (best := self._best()) is not None:
            score: Any = best.best_model_score
            values["best"] = {best.monitor: float(score)}
            values["best_checkpoint"] = os.path.relpath(best.best_model_path, folder)
        if final:
            values["final"] = final
        if trainer.should_stop or "stopped_early" in before:
            from boltlab.training import stopped

            values |= stopped.early(trainer, folder)
        for callback in trainer.callbacks:
            values |= getattr(callback, "run_summary", dict)()
        seconds = before.get("fit_seconds", 0.0) + time.perf_counter() - self.began
        known = runs.write_summary(folder, fit_seconds=round(seconds, 2), **values)
        tell_loggers(trainer, best=known.get("best", {}), final=known.get("final", {}))
        for logger in trainer.loggers:
            for name, path in (("best", Path(best.best_model_path) if best else None), ("last", self.last)):
                if hasattr(logger, "log_checkpoint") and path is not None and path.is_file():
                    logger.log_checkpoint(path, name)

    def _best(self) -> ModelCheckpoint | None:
        return best_callback(self.trainer, self.config.monitor)

    def test(self) -> dict[str, Any]:
        """Tests the best checkpoint, else the last one, else the weights in memory; returns what the summary notes."""
        lacking = lacks("test_step", self.model) or lacks("test_dataloader", self.data, self.model)
        if not self.config.test or lacking or self.trainer.fast_dev_run:
            if self.config.test and lacking and self.leads:
                print(f"{lacking}: nothing is tested", flush=True)
            return {"test": {}}
        best, last = self._best(), str(self.last) if self.last.is_file() else None
        path = best.best_model_path if best else last
        self.trainer.test(self.model, datamodule=self.data, ckpt_path=path, verbose=False)
        return {"test": numbers(self.trainer.callback_metrics), "tested": "best" if best else "last"}

    def finish(self, tested: dict[str, Any]) -> None:
        if self.record is not None:
            self.record.wait()
        if self.leads:
            runs.end(self.folder, status="finished", **tested)
            tell_loggers(self.trainer, test=tested["test"])
        for logger in self.trainer.loggers:
            getattr(logger, "finish", lambda: None)()  # a W&B run stays open between fit and test
