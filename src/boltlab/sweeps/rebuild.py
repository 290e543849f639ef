"""A study and the run folders beside it: whether they belong together, and making a lost study anew from the runs."""

import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from boltlab import runs
from boltlab.ground.errors import UserError
from boltlab.sweeps import space as spaces

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CURE = "rebuild=true makes it anew from the runs there, another name=… begins a new sweep"


def refuse_damaged(database: Path) -> None:
    """
    Raises:
        UserError: the file is there, and SQLite cannot read all of it.
    """
    try:
        if database.is_file():
            with closing(sqlite3.connect(database, timeout=60)) as connection:
                ((said,),) = connection.execute("PRAGMA quick_check(1)").fetchall()
                if said != "ok":
                    raise sqlite3.DatabaseError(said.splitlines()[-1])
    except sqlite3.OperationalError:  # locked, a full disk, …: whoever opens it says so
        return
    except sqlite3.DatabaseError as e:
        raise UserError(f"{runs.shown(database)} is damaged ({e}): {CURE}") from None


def refuse_strangers(top: Path, space: list[spaces.Dimension], trials: Sequence["FrozenTrial"]) -> None:
    """A run is a trial's if its overrides say so: its number may be that of another one, of a study that was lost.

    Raises:
        UserError: the study does not know the trial of a run, or knows it with other values.
    """
    strange = [
        folder.name
        for folder, number, params in _runs(top, space)
        if number >= len(trials) or (params is not None and params != trials[number].params)
    ]
    if strange:
        named = ", ".join(strange[:5]) + ", …" * (len(strange) > 5)
        what = f"the study of {runs.shown(top)} was lost or is another one: it does not know the values of run"
        raise UserError(f"{what} {named}; {CURE}")


def set_aside(top: Path) -> None:
    """Renames the files of a study, so that a new one can stand in their place."""
    for path in top.glob("study.*"):
        path.rename(path.with_name(f"before-{time.strftime('%Y-%m-%d_%H-%M-%S')}-{path.name}"))


def fill(study: Any, top: Path, space: list[spaces.Dimension]) -> None:
    """Gives an empty study a trial for each run that there is, as if its worker had left it: the next one reads what
    became of it, or resumes it. A number without a run is drawn anew.

    Raises:
        UserError: the study has trials.
    """
    from optuna.trial import FixedTrial, TrialState, create_trial

    if study.get_trials(deepcopy=False):
        raise UserError("rebuild=true: the storage has trials of this sweep; delete its study there first")
    known = {number: params for _, number, params in _runs(top, space) if params is not None}
    for number in range(max(known, default=-1) + 1):
        fixed: Any = FixedTrial(known.get(number, {}))
        params = spaces.suggest_all(space, fixed) if number in known else {}
        state, left = (TrialState.RUNNING, {"at": None}) if number in known else (TrialState.WAITING, {})
        study.add_trial(create_trial(state=state, params=params, distributions=fixed.distributions, user_attrs=left))


def _runs(top: Path, space: list[spaces.Dimension]) -> Iterator[tuple[Path, int, dict[str, Any] | None]]:
    """(folder, number of its trial, params) of each run; None where it does not say what it was given."""
    for folder in sorted(top.iterdir()):
        match = re.fullmatch(r"(\d+)(-.+)?", folder.name)
        if match is None or not (folder / "config.yaml").is_file():
            continue
        params = None
        try:
            texts = yaml.load((folder / "overrides.yaml").read_text(encoding="utf-8"), runs.PlainLoader)
            params = spaces.params(space, texts)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            pass
        yield folder, int(match[1]), params
