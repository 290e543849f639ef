"""Resuming a run in its own folder: what may be changed, and what a change does to exactness."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config import renamed
from boltlab.config.effects import CHANGEABLE_ON_RESUME, RESTORED
from boltlab.config.trust import paths_inside
from boltlab.ground import credentials
from boltlab.ground.errors import DataError, UserError


def changes(
    before: Any, after: Any, path: str = "", free: tuple[str, ...] = CHANGEABLE_ON_RESUME
) -> list[tuple[str, Any, Any]]:
    """(key path, value before, value after) of all that differs between two plain configs, the free keys left out."""
    if not path:
        before = renamed.current(before)
    if path in free:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after}, key=str)
        parts = [changes(before.get(k), after.get(k), f"{path}.{k}" if path else str(k), free) for k in keys]
        return [change for part in parts for change in part]
    return [] if before == after else [(path, before, after)]


def check(content: dict[str, Any], config: DictConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """The changes that break exactness, between a checkpoint's own config and that of the run that resumes from it.

    Raises:
        UserError: something changed that a checkpoint restores, or that needs `resume_changed=restart_epoch`.
    """
    found = changes(content["config"], credentials.plain(config))
    restored = [change for change in found if change[0].split(".")[0] in RESTORED]
    if restored:
        raise UserError(
            f"{_listed(restored)}: a resumed run takes these from its checkpoint. To change them, start a new run"
            f" from its weights: init_from={folder}"
        )
    if found and config.resume_changed != "restart_epoch":
        raise UserError(
            f"{_listed(found)}: with that the run cannot go on exactly where it stood."
            " resume_changed=restart_epoch begins the broken epoch again with the new values (the steps that were"
            " done of it stay); without the change, the run resumes to the same weights as if it had never stopped"
        )
    return found


def refuse_finished(content: dict[str, Any], config: DictConfig, folder: Path) -> None:
    """
    Raises:
        UserError: the run is finished, and its config asks for no more; or it asks for less than was done.
    """
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    steps, limits = content["global_step"], config.trainer
    done = f"after {epochs} epochs ({steps} steps)"
    longer = []
    for key, count in (("max_epochs", epochs), ("max_steps", steps)):
        if limits.get(key) not in (None, -1) and limits[key] < count:
            raise UserError(f"trainer.{key}={limits[key]} is less than {runs.shown(folder)} has done, {done}")
        if limits.get(key) == count:
            longer.append(f"trainer.{key}=… with a larger number extends it")
    if _stops(content, config):
        stopped = "early stopping or a time limit ended it"
        longer.append(f"{stopped}: callbacks.early_stopping.patience=… or trainer.max_time=…")
    if longer and runs.read_summary(folder).get("status") == "finished":
        broken = (run for run in runs.folders(config.log_dir) if runs.status(runs.read_summary(run), run).resumable)
        other = next(broken, None)
        hint = f". The newest run that is not finished: resume={other.name}" if other else ""
        raise UserError(f"{runs.shown(folder)} is finished, {done}; {'; '.join(longer)}{hint}")


def _stops(content: dict[str, Any], config: DictConfig) -> bool:
    """Whether what had ended the training, beside its length, still does with this config."""
    before, now = content["config"], credentials.plain(config)
    if not content["callbacks"].get("Last", {}).get("stops"):
        return False
    if before["trainer"].get("max_time") != now["trainer"].get("max_time"):
        return False
    stopping = (now.get("callbacks") or {}).get("early_stopping")
    if stopping == (before.get("callbacks") or {}).get("early_stopping") or stopping is None:
        return True
    waited = [state["wait_count"] for key, state in content["callbacks"].items() if key.startswith("EarlyStopping")]
    return any(count >= stopping["patience"] for count in waited)


def longer(content: dict[str, Any], config: DictConfig) -> bool:
    """Whether the length of the run is another than before."""
    before = content["config"]["trainer"]
    return any(before.get(key) != config.trainer.get(key) for key in ("max_epochs", "max_steps"))


def place(content: dict[str, Any]) -> str:
    """Where a checkpoint stands, for people."""
    loops = content["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    middle = f", after batch {batches['ready']} of epoch {epochs['processed'] + 1}"
    unfinished = epochs["processed"] != epochs["started"]
    return f"step {content['global_step']}, {epochs['processed']} epochs done{middle if unfinished else ''}"


def _listed(found: list[tuple[str, Any, Any]]) -> str:
    texts = [f"{key} was {before!r}, is now {after!r}" for key, before, after in found[:8]]
    return "; ".join([*texts, *([f"and {len(found) - 8} more"] if len(found) > 8 else [])])


def adapt(content: dict[str, Any], config: DictConfig, data: Any) -> None:
    """Makes a checkpoint fit the config that resumes from it, in place: its files stand where the folder is now, and
    `resume_changed=restart_epoch` begins the broken epoch again if something changed that asks for it.

    Raises:
        DataError: the data are others than those of the checkpoint.
    """
    _renew(content, data.trainer.world_size)
    content["callbacks"] = paths_inside(Path(config.run_dir), content.get("callbacks", {}))
    _adapt_callbacks(content, config, {callback.state_key for callback in data.trainer.callbacks})
    loaders = content["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    try:
        for state in (state for state in loaders if "samples" in state):  # of boltlab.data.loader
            data.train_dataloader().refuse_other_data(state)
    except DataError:
        if config.resume_changed != "restart_epoch":
            raise
        restart_epoch(content)
    replaced = data.trainer.strategy.broadcast(getattr(data, "replaced", False))  # one process has looked at the files
    if replaced or changes(content["config"], credentials.plain(config)):
        restart_epoch(content)


def _adapt_callbacks(content: dict[str, Any], config: DictConfig, known: set[str]) -> None:
    """known: the keys of today's callbacks."""
    states = content["callbacks"]
    for key in [key for key in states if "'monitor'" in key and key not in known]:
        del states[key]  # it watched another metric, or the other way: what is best begins anew
    if "Last" in states:
        states["Last"]["stops"] = _stops(content, config)
    stopping = OmegaConf.select(config, "callbacks.early_stopping")
    for key, state in states.items():
        if key.startswith("EarlyStopping") and stopping is not None:
            state["patience"] = stopping.patience  # its own state holds the old one


def _renew(content: dict[str, Any], processes: int) -> None:
    """Brings what an older version kept of a classifier or a regressor into the form of today, in place."""
    import torch

    kept = content.pop("task", None)
    if kept is None or "exact" in content:
        return
    counted = {f"train_metrics.{name}": value for name, value in kept.get("train_metrics", {}).items()}
    shares = []
    for rank in range(processes):  # it had added up those of all processes
        mine = {name: torch.zeros_like(value) if rank else value for name, value in counted.items()}
        attributes = {name: {"tensor": value, "cpu": False} for name, value in mine.items()}
        shares.append({"module": {"attributes": attributes, "evaluating": []}, "sums": []})
    metrics = {name: torch.tensor(value) for name, value in kept.get("metrics", {}).items()}
    content["exact"] = {"processes": shares, "metrics": metrics, "ended": None}


class DataRecord:
    """Writes into `data.json` what the run has loaded; of a resumed run, the data are those that stand there.

    A new run trains while names and sizes of its files are looked at; see `wait`. A run that resumes is checked before
    it trains, and contents are read before: a stop signal could not wait for them.
    """

    def __init__(self, folder: Path, config: DictConfig, data: Any, goes_on: bool) -> None:
        self.folder, self.config, self.data, self.goes_on = folder, config, data, goes_on
        self._pool = ThreadPoolExecutor(1)
        self._begun: list[Future[None]] = []

    def __call__(self, split: str) -> None:
        """Records a split that was loaded.

        Raises:
            DataError: it is another than before, and `resume_changed` does not allow that.
        """
        from boltlab.data.fingerprint import of_samples

        contents = self.config.get("data_fingerprint") == "contents"
        samples = of_samples(self.data, split, contents)  # type: ignore[arg-type]
        self._begun.append(self._pool.submit(self._record, split, samples, contents))
        if self.goes_on or contents:
            self.wait()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies, of a module with its Trainer or in a data worker, record nothing

    def wait(self) -> None:
        """Returns when all that was loaded is recorded: before the first checkpoint, and before the run has ended."""
        while self._begun:
            self._begun.pop(0).result()

    def _record(self, split: str, samples: dict[str, Any], contents: bool) -> None:
        from boltlab.data.fingerprint import ROUNDED, differences, of_files

        path = self.folder / "data.json"
        splits = runs.read_json(path).get("splits")
        known = {k: v for k, v in (splits if isinstance(splits, dict) else {}).items() if isinstance(v, dict)}
        now = samples | of_files(self.data, split, contents)  # type: ignore[arg-type]
        then = known.get(split, {}) if self.goes_on else {}
        others = [found for found in differences(then, now) if found != ROUNDED]
        if others and self.config.resume_changed != "restart_epoch":
            raise DataError(
                f"the {split} split is not what {runs.shown(self.folder)} was trained on ({'; '.join(others)}):"
                " resume_changed=restart_epoch resumes with it"
            )
        self.data.replaced |= bool(others)
        kind = self.config.get("data_fingerprint", "names")
        runs.write_json(path, {"fingerprint": kind, "splits": {**known, split: now}}, sync=True)


def restart_epoch(content: dict[str, Any]) -> None:
    """Forgets where in its epoch a checkpoint stands: the epoch is trained anew, from the weights as they are."""
    loops = content["loops"]["fit_loop"]
    loops["state_dict"].pop("combined_loader", None)
    epochs = loops["epoch_progress"]
    if epochs["current"]["processed"] == epochs["current"]["started"]:
        return  # it stands at an epoch's end
    for counted in epochs.values():
        counted.update(dict.fromkeys(counted, counted["completed"]))
    for progress in (loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]):
        progress["total"].update(dict.fromkeys(progress["total"], progress["total"]["completed"]))
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["is_last_batch"] = False
    content.pop("exact", None)
