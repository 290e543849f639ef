"""The data that a trained model is evaluated on: those of its training, or others, which are taken whole."""

import filecmp
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config.build import build
from boltlab.config.effects import NO_EFFECT, under
from boltlab.config.trust import refuse_untrusted
from boltlab.data.base import DataModule, Split
from boltlab.data.fingerprint import ROUNDED, differences, fingerprint
from boltlab.data.tabular import TableDataModule
from boltlab.ground.errors import DataError, UserError
from boltlab.runs import data_places
from boltlab.training.load import fitted
from boltlab.training.plain import take_over

SPLITS: tuple[Split, ...] = ("train", "val", "test")
_AS_IN_TRAINING = under(*NO_EFFECT, *(f"data.{key}" for key in ("batch_size", "max_bad_files", "cache", "decode")))
FILES_COMPARED = 200  # of each split of a folder that may be a copy, byte by byte


def build_data(config: DictConfig, content: dict[str, Any], run: Path, given: Sequence[str]) -> tuple[Any, str]:
    """The data module of an evaluation, with what the run has fitted on its training samples.

    Data that were not trained on are not divided: all of them are the split that is asked for, or all of that split
    where they bring splits of their own. Data that were only moved are those trained on: the run's `data.json` knows.
    Where no key of the data is given, they are those trained on, or an error.

    Args:
        config: of the evaluation.
        content: of the checkpoint.
        run: the folder of the run.
        given: the keys that the command line gives.

    Returns:
        The module; and what it reads, for people, where that is not simply the data of the training.

    Raises:
        UserError: an old run has not kept what it fitted; or the data are others, and were not asked for.
    """
    data, known = build(config, "data"), fitted(content)
    if not isinstance(data, DataModule):
        take_over(data, content)
        return data, ""
    trained, evaluated = _configs(config, content, run)
    at = {key: evaluated[key] for key in data.located_by if key in evaluated}
    asked = "data" in given or any(f"data.{key}" in given for key in at)
    said = _told_apart(data, trained, evaluated, at if asked else {}, known, run)
    if data.whole and isinstance(data, TableDataModule) and "mean" not in known:
        raise UserError(
            f"{runs.shown(run)} was trained before runs kept what they fit on their training rows, which standardizes"
            " all others: train again"
        )
    data.load_state_dict({"fitted": known})
    if data.whole and not asked:
        raise _others(run, at, "data.json")
    if all(_AS_IN_TRAINING.match(key) for key in given if key.split(".")[0] == "data"):
        data.on_load = partial(_compare, data, run, at)
    return data, said


def _configs(config: DictConfig, content: dict[str, Any], run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the data of the training, and of those of the evaluation."""
    then = content["config"]
    before = OmegaConf.create({"data": then.get("data") or {}, "log_dir": then.get("log_dir")})
    data_places.settle(before, run)
    trained: Any = OmegaConf.to_container(before.data)
    evaluated: Any = OmegaConf.to_container(config.data)
    refuse_untrusted({"data": trained}, "the checkpoint's config")
    return trained, evaluated


def _told_apart(
    data: DataModule,
    trained: dict[str, Any],
    evaluated: dict[str, Any],
    asked: dict[str, Any],
    known: dict[str, Any],
    run: Path,
) -> str:
    """Sets whether the data are others than those of the training; returns what to say of them. asked: where they are
    by the command line."""
    elsewhere = _elsewhere(trained, evaluated, data.located_by)
    if not elsewhere and not (asked and _recorded(run)):
        return ""
    data.whole = not _moved(trained, {key: evaluated[key] for key in elsewhere or asked}, known, run)
    if not (data.whole or elsewhere):
        return ""
    name = next((evaluated[key] for key in data.located_by if key in evaluated), type(data).__name__)
    return f"{name}, {'not the data trained on' if data.whole else 'the data trained on at another place'}"


def _compare(data: DataModule, run: Path, at: dict[str, Any], split: Split) -> None:
    """Compares a split that was loaded with what the run has recorded of its data.

    Raises:
        DataError: it is another; only a line where no key tells such data from others.
    """
    known = _recorded(run)
    for one in [split] if split in known else list(known):
        if found := _differences(data, run, one):
            error = _others(run, at, f"{one} split: {'; '.join(found)}")
            if at:
                raise error
            print(error, file=sys.stderr, flush=True)


def _others(run: Path, at: dict[str, Any], found: str) -> DataError:
    cure = next((f": data.{key}={value} evaluates them all the same" for key, value in at.items()), "")
    return DataError(f"the data are not those that {runs.shown(run)} was trained on ({found}){cure}")


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


def _recorded(run: Path) -> dict[Split, dict[str, Any]]:
    splits = runs.read_json(run / "data.json").get("splits")
    return {s: splits[s] for s in SPLITS if isinstance(splits.get(s), dict)} if isinstance(splits, dict) else {}


def _as_recorded(data: DataModule, run: Path) -> bool:
    """Whether `data.json` of a run holds something of the data, and nothing else than they are."""
    known = _recorded(run)
    return bool(known) and not any(_differences(data, run, split) for split in known)


def _differences(data: DataModule, run: Path, split: Split) -> list[str]:
    """What a split differs in from what `data.json` of a run holds of it."""
    then = _recorded(run)[split]
    now = fingerprint(data, split, runs.read_json(run / "data.json").get("fingerprint") == "contents")
    if "values" in then and "values" in now:  # they say more than the name and the size of a file
        then = {key: value for key, value in then.items() if key not in ("files", "bytes", "names_and_sizes")}
    found = differences(then, now)
    return [text for text in found if text != ROUNDED or "files" in now]  # what is read is not computed


def _same_bytes(data: DataModule, place: Path) -> bool:
    """Whether files have the content of those in the folder of the training, as far as they are still there."""
    for split in SPLITS:
        files = data.files(split)
        for name, path in files[:: max(1, len(files) // FILES_COMPARED)]:
            if (place / name).is_file() and not filecmp.cmp(place / name, path, shallow=False):
                return False
    return True
