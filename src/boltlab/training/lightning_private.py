"""Private names of Lightning that exact resume needs, each with its reason. Checked with Lightning 2.6.6."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl

from boltlab.ground.errors import UserError

# Called when a loop asks for its next batch, and when it has it: all of the step before is done (logged rows, plateau
# schedulers, the module's own on_train_batch_end), and no hook has seen the next batch yet.
_OF_LOOPS = ("_on_before_fetch", "_on_after_fetch", "_results")
# By the object of a Trainer that has them.
NAMES = {
    "fit_loop": (
        # Where `configure_optimizers` asks for the number of steps, Lightning sets the loaders up before it has their
        # state, and never hands it to them.
        *("_combined_loader_states_to_load", "_load_combined_loader_states"),
        "_last_train_dl_reload_epoch",  # a resumed run would count the epochs to the next reload anew
        "_data_fetcher",  # it knows how many batches it has fetched ahead of the step
    ),
    "fit_loop.epoch_loop": _OF_LOOPS,  # the sums of `self.log(on_epoch=True)` are in no checkpoint of Lightning
    "fit_loop.epoch_loop.val_loop": (*_OF_LOOPS, "_module_mode"),
    **dict.fromkeys(("validate_loop", "test_loop"), _OF_LOOPS),  # means over several processes: see `float_counts`
    "_logger_connector": ("_first_loop_iter",),  # the first `self.log` after a resume would reset the sums
}


# By the callback, where validations do not end each epoch: see `monitored`.
OF_CALLBACKS = {
    "ModelCheckpoint": (
        *("_save_topk_checkpoint", "_save_last_checkpoint", "_should_save_on_train_epoch_end"),
        *("_should_skip_saving_checkpoint", "_monitor_candidates"),
    ),
    "EarlyStopping": ("_run_early_stopping_check",),
}


def check(owner: Any, names: Mapping[str, Sequence[str]] = NAMES) -> None:
    """
    Raises:
        UserError: this Lightning lacks one of the names, by the object below `owner` that has them.
    """
    for path in (f"{path}.{name}" for path, found in names.items() for name in found):
        try:
            attrgetter(path)(owner)
        except AttributeError as e:
            cure = "which exact resume needs: pip install 'lightning>=2.6.6,<2.7'"
            raise UserError(f"Lightning {pl.__version__} has no {path}, {cure}") from e


def around_fetches(loop: Any, before: Callable[[], None] | None, after: Callable[[], None]) -> None:
    """Has a loop call `before` when it asks for its next batch, and `after` when it has the batch."""
    ask, received = loop._on_before_fetch, loop._on_after_fetch

    def asking() -> None:
        before()  # type: ignore[misc]
        ask()

    def receiving() -> None:
        received()
        after()

    if before is not None:
        loop._on_before_fetch = asking
    loop._on_after_fetch = receiving


def evaluation_loops(trainer: Any) -> list[Any]:
    return [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop]


def fetched_ahead(trainer: Any) -> int:
    """Batches that the loaders have delivered for steps still to come: one where they have no length."""
    loop = trainer.fit_loop
    fetcher, ready = loop._data_fetcher, loop.epoch_loop.batch_progress.current.ready
    ahead = hasattr(fetcher, "batches") and fetcher.length is None
    return max(0, fetcher.fetched - ready) if ahead else 0


def hand_loaders_their_state(trainer: Any, again: bool) -> None:
    """Loads what Lightning has not loaded, and begins to fetch anew where that was so or `again` says so."""
    loop = trainer.fit_loop
    pending = bool(loop._combined_loader_states_to_load)
    loop._load_combined_loader_states()
    if (pending or again) and loop._data_fetcher is not None:
        iter(loop._data_fetcher)


def loaded_in(trainer: Any, epoch: int) -> None:
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def training_modes(trainer: Any) -> dict[str, bool]:
    """Which submodules were in training mode before the validation began."""
    return trainer.fit_loop.epoch_loop.val_loop._module_mode.mode


def logged_metrics(loop: Any) -> set[str]:
    """Names of the metrics that were logged as objects in a loop."""
    return {result.meta.metric_attribute for result in loop._results.values() if not result.is_tensor}


def end_epoch(trainer: Any, metrics: list[str]) -> None:
    """Does the rest of the epoch at whose end a checkpoint was saved, which Lightning leaves out after a resume: the
    plateau schedulers are stepped, and the metrics that were logged as objects are reset."""
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    epochs.completed -= 1  # a schedule's `frequency` counts the epoch that ends
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    epochs.completed += 1
    for name in metrics:
        trainer.lightning_module.get_submodule(name).reset()


def float_counts(loop: Any) -> None:
    """Has the numbers of samples behind logged means be floats: Lightning takes their mean over the processes, and of
    15 and 16 makes 15 if they are whole numbers."""
    for result in loop._results.values():
        count = getattr(result, "cumulated_batch_size", None)
        if count is not None:
            result.cumulated_batch_size = count.float()


def logged_sums(trainer: Any) -> list[dict[str, Any]]:
    """What `self.log` holds of the epoch, as plain values."""
    return [_entry(result) for result in trainer.fit_loop.epoch_loop._results.values() if not result.has_reset]


_FLAGS = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute")
_BUILTIN = {"min": min, "max": max, "sum": sum}


def _entry(result: Any) -> dict[str, Any]:
    meta, cache = result.meta, result._forward_cache
    entry = {"fx": meta.fx, "name": meta.name, **{name: getattr(meta, name) for name in _FLAGS}}
    entry |= {"reduce": meta.reduce_fx.__name__, "builtin": meta.reduce_fx in _BUILTIN.values()}
    entry |= {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
    entry["step"] = cache.detach().clone() if hasattr(cache, "detach") else None
    if result.is_tensor:
        entry["value"] = result.value.detach().clone()
        if meta.is_mean_reduction:
            entry["samples"] = result.cumulated_batch_size.clone()
    return entry


def restore_logged_sums(trainer: Any, module: "pl.LightningModule", entries: list[dict[str, Any]]) -> None:
    """Fills the collection by its own `log`, so that the module's next `self.log` adds to it."""
    import torch

    results = trainer.fit_loop.epoch_loop._results
    for entry in entries:
        tensor = "value" in entry
        value = torch.zeros((), device=module.device) if tensor else module.get_submodule(entry["metric_attribute"])
        results.log(
            entry["fx"],
            entry["name"],
            value,
            **{name: entry[name] for name in (*_FLAGS, "sync_dist", "rank_zero_only")},
            reduce_fx=_BUILTIN[entry["reduce"]] if entry["builtin"] else entry["reduce"],
            sync_dist_fn=trainer.strategy.reduce,
            batch_size=1,
        )
        result = results[f"{entry['fx']}.{entry['name']}"]
        if tensor:
            result.value = entry["value"].to(module.device)
        if "samples" in entry:
            result.cumulated_batch_size = entry["samples"].to(module.device)
        result._forward_cache = entry["step"] if entry["step"] is None else entry["step"].to(module.device)


def not_the_first_batch(trainer: Any) -> None:
    """Keeps the first `self.log` of the next step from resetting the sums, as it does at the start of an epoch."""
    trainer._logger_connector._first_loop_iter = False
