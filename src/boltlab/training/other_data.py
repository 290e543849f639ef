"""The data that a trained model is evaluated on: those of its training, or others, which are taken whole."""

import filecmp
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config.build import build
from boltlab.config.trust import refuse_untrusted
from boltlab.data.base import DataModule, Split
from boltlab.data.fingerprint import differences, fingerprint
from boltlab.data.tabular import TableDataModule
from boltlab.ground.errors import UserError
from boltlab.training.load import fitted
from boltlab.training.plain import take_over

SPLITS: tuple[Split, ...] = ("train", "val", "test")
FILES_COMPARED = 200  # of each split of a folder that may be a copy, byte by byte


def build_data(config: DictConfig, content: dict[str, Any], run: Path) -> tuple[Any, str]:
    """The data module of an evaluation, with what the run has fitted on its training samples.

    Data that were not trained on are not divided: all of them are the split that is asked for, or all of that split
    where they bring splits of their own. Data that were only moved are those trained on: the run's `data.json` knows.

    Args:
        config: of the evaluation.
        content: of the checkpoint.
        run: the folder of the run.

    Returns:
        The module; and what it reads, for people, where that is not simply the data of the training.

    Raises:
        UserError: an old run has not kept what it fitted.
    """
    data, known = build(config, "data"), fitted(content)
    if not isinstance(data, DataModule):
        take_over(data, content)
        return data, ""
    trained: dict[str, Any] = content["config"].get("data") or {}
    evaluated: Any = OmegaConf.to_container(config.data)
    refuse_untrusted({"data": trained}, "the checkpoint's config")
    said, elsewhere = "", _elsewhere(trained, evaluated, data.located_by)
    if elsewhere:
        said = str(next((evaluated[key] for key in data.located_by if key in evaluated), type(data).__name__))
        data.whole = not _moved(trained, {key: evaluated[key] for key in elsewhere}, known, run)
        said += ", not the data trained on" if data.whole else ", the data trained on at another place"
    if data.whole and isinstance(data, TableDataModule) and "mean" not in known:
        raise UserError(
            f"{runs.shown(run)} was trained before runs kept what they fit on their training rows, which standardizes"
            " all others: train again"
        )
    data.load_state_dict({"fitted": known})
    return data, said


def tell(data: DataModule, said: str, split: Split) -> None:
    """Prints what a split that was loaded is."""
    every = "all " if data.whole else ""
    print(f"{split} split: {every}{len(data.dataset(split)):,} samples of {said}", flush=True)


def _elsewhere(trained: dict[str, Any], evaluated: dict[str, Any], located_by: tuple[str, ...]) -> list[str]:
    """The keys that lead to other data."""
    common = [key for key in located_by if key in trained and key in evaluated]
    if not common and trained.get("_target_") != evaluated["_target_"]:
        return ["_target_"]
    return [key for key in common if _resolved(trained[key]) != _resolved(evaluated[key])]


def _resolved(value: Any) -> Any:
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) else value


def _moved(trained: dict[str, Any], elsewhere: dict[str, Any], fitted: dict[str, Any], run: Path) -> bool:
    """Whether the data are those that the run has recorded."""
    if "_target_" in elsewhere:
        return False
    places = [Path(trained[key]).expanduser() for key in elsewhere if isinstance(trained[key], str)]
    try:
        data = build({"data": {**trained, **elsewhere}}, "data")
        data.load_state_dict({"fitted": fitted})
        return _as_recorded(data, run) and all(_same_bytes(data, place) for place in places)
    except UserError:  # not readable as those of the training are
        return False


def _as_recorded(data: DataModule, run: Path) -> bool:
    """Whether `data.json` of a run holds something of the data, and nothing else than they are."""
    recorded = runs.read_json(run / "data.json")
    splits = recorded.get("splits")
    known = {s: splits[s] for s in SPLITS if isinstance(splits.get(s), dict)} if isinstance(splits, dict) else {}
    for split, then in known.items():
        now = fingerprint(data, split, recorded.get("fingerprint") == "contents")
        if "values" in then and "values" in now:  # they say more than the name and the size of a file
            then = {key: value for key, value in then.items() if key not in ("files", "bytes", "names_and_sizes")}
        if differences(then, now):
            return False
    return bool(known)


def _same_bytes(data: DataModule, place: Path) -> bool:
    """Whether files have the content of those in the folder of the training, as far as they are still there."""
    for split in SPLITS:
        files = data.files(split)
        for name, path in files[:: max(1, len(files) // FILES_COMPARED)]:
            if (place / name).is_file() and not filecmp.cmp(place / name, path, shallow=False):
                return False
    return True
