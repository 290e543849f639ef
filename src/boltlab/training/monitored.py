"""Where validations do not end each epoch: what monitors a metric acts on values of the weights as they are."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from boltlab.training import lightning_private


class Monitored(Callback):
    """Lightning keeps the last value of each metric, and its ModelCheckpoint, EarlyStopping and plateau schedulers take
    it for one of the weights as they are. Here the metrics of a validation are acted on once for each validation, those
    of the training at the end of each epoch. A checkpoint that is due in between is saved when there is a new value.

    Stands before the callbacks that it changes, and behind the one that knows the metrics of a resumed run.
    """

    def __init__(self, trainer: "pl.Trainer") -> None:
        lightning_private.check(pl.callbacks, lightning_private.OF_CALLBACKS)
        self.trainer, self.validations, self.step = trainer, 0, -1
        self.names: set[str] = set()  # what validations log
        self.looked: dict[str, int] = {}  # at which validation, by who looks once at each
        self.due: set[str] = set()  # the ModelCheckpoints that wait for a value
        self._before: dict[str, Any] = {}  # the validation
        self._old: dict[str, Any] = {}  # of the epochs before
        self._stopping: list[EarlyStopping] = []

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for saves in (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor):
            self._when_new(saves)
        for stops in (c for c in callbacks if isinstance(c, EarlyStopping)):
            if stops._check_on_train_epoch_end is None:
                self._stopping.append(stops)
            check = partial(self._check, stops, stops._run_early_stopping_check)
            stops._run_early_stopping_check = check  # type: ignore[method-assign]

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        loop = trainer.fit_loop.epoch_loop
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            update = partial(self._update, loop._update_learning_rates)
            loop._update_learning_rates = update  # type: ignore[method-assign]
        self._old = dict(trainer.callback_metrics)
        self._place_checks()

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._old = dict(trainer.callback_metrics)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            known = trainer.callback_metrics
            self.names |= {name for name, value in known.items() if self._before.get(name) is not value}
            self.validations, self.step = self.validations + 1, trainer.global_step
            self._place_checks()

    def _place_checks(self) -> None:
        for stops in self._stopping:
            stops._check_on_train_epoch_end = stops.monitor not in self.names

    def _waits(self, name: str) -> bool:
        """Whether the metric may come with the first validation."""
        first: Any = not self.validations and self.trainer.enable_validation
        return bool(first) and name not in self.trainer.callback_metrics

    def _of_now(self, name: str) -> bool:
        """Whether the value was measured with the weights as they are."""
        if name in self.names:
            return self.step == self.trainer.global_step
        known = self.trainer.callback_metrics
        return not self._waits(name) and (name not in known or known[name] is not self._old.get(name))

    def _first_look(self, who: str, name: str) -> bool:
        """Whether `who` has not acted on the value before."""
        if name not in self.names:
            return not self._waits(name)
        new = self.looked.get(who) != self.validations
        self.looked[who] = self.validations
        return new

    def _check(self, stops: EarlyStopping, check: Any, trainer: "pl.Trainer") -> None:
        if self._first_look(stops.state_key, stops.monitor):
            check(trainer)

    def _update(self, update: Any, interval: str, update_plateau_schedulers: bool) -> None:
        strategy = self.trainer.strategy
        all_of_them = strategy.lr_scheduler_configs
        if update_plateau_schedulers:
            strategy.lr_scheduler_configs = [
                config
                for number, config in enumerate(all_of_them)
                if not (config.reduce_on_plateau and config.interval == interval)
                or self._first_look(f"schedule {number}", str(config.monitor))
            ]
        try:
            update(interval, update_plateau_schedulers)
        finally:
            strategy.lr_scheduler_configs = all_of_them

    def _when_new(self, saves: Any) -> None:
        at_epoch_end, save, key = saves._should_save_on_train_epoch_end, saves._save_topk_checkpoint, saves.state_key

        def should_save_on_train_epoch_end(trainer: Any) -> bool:
            chosen = saves._save_on_train_epoch_end is not None
            return bool(at_epoch_end(trainer)) if chosen else saves.monitor not in self.names or at_epoch_end(trainer)

        def save_if_new(trainer: Any, candidates: dict[str, Any]) -> None:
            if self._of_now(saves.monitor):
                save(trainer, candidates)
            else:
                self.due.add(key)

        def then_what_was_due(hook: Any, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
            hook(trainer, pl_module)
            waited = key in self.due or saves._defer_save_until_validation
            known = saves.monitor in trainer.callback_metrics and self._of_now(saves.monitor)
            if waited and known and not saves._should_skip_saving_checkpoint(trainer):
                self.due.discard(key)
                saves._defer_save_until_validation = False
                candidates = saves._monitor_candidates(trainer)
                save(trainer, candidates)
                saves._save_last_checkpoint(trainer, candidates)

        saves._should_save_on_train_epoch_end = should_save_on_train_epoch_end
        saves._save_topk_checkpoint = save_if_new
        for hook in ("on_validation_end", "on_train_epoch_end"):
            setattr(saves, hook, partial(then_what_was_due, getattr(saves, hook)))

    def state_dict(self) -> dict[str, Any]:
        counted = {"validations": self.validations, "step": self.step, "looked": dict(self.looked)}
        return {**counted, "names": sorted(self.names), "due": sorted(self.due)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.step, self.looked = (state_dict[name] for name in ("validations", "step", "looked"))
        self.names, self.due = set(state_dict["names"]), set(state_dict["due"])
