"""What a worker makes of the ways in which a trial can end; stand-ins for the processes of its runs."""

import math
import time

import pytest
import yaml
from waiting import HANG

from boltlab import runs
from boltlab.ground.errors import UserError
from boltlab.sweeps import worker as workers
from boltlab.sweeps.study import FINAL, RETRY, Study
from boltlab.sweeps.table import best_of

ASKED = {
    "name": "s",
    "train": [],
    "space": {"lr": "tag(log,interval(1e-4,1e-1))"},
    "objectives": {"val_acc": "max"},
    "sampler": {"_target_": "optuna.samplers.RandomSampler"},
    "pruner": {"_target_": "optuna.pruners.NopPruner"},
    "parts": [["", []]],
    "validations": 2,
    "seed": 0,
}


class Run:
    """Ends as `ends` says of its trial or part: with these values, by a signal (negative) once all parts of the trial
    are at work, or, None, when it is told to stop."""

    ends: dict
    parts: int
    begun: list

    def __init__(self, entry, folder, variables, threads):
        self.folder, self.told, self.stopped = folder, False, None
        self.trial, _, part = folder.name.partition("-")
        self.end = self.ends.get(part or self.trial, [0.5])
        self.until = time.monotonic() + HANG  # a test that fails comes to an end too
        self.begun.append(self)

    def send(self, signum):
        self.told = True

    def running(self, seconds):
        beside = sum(run.trial == self.trial for run in self.begun)
        waits = self.end is None or (isinstance(self.end, int) and beside < self.parts)
        return waits and not self.told and time.monotonic() < self.until

    def wait(self):
        if self.stopped is None:
            self.stopped = self.told
            if isinstance(self.end, list):
                (self.folder / "metrics.csv").write_text("\n".join(["val_acc", *map(str, self.end)]))
                runs.write_summary(self.folder, status="finished", final={"val_acc": self.end[-1]})
            elif self.end is None:
                runs.write_summary(self.folder, status="interrupted")
        return 143 if self.end is None else self.end if isinstance(self.end, int) else 0


def make_run(overrides, folder):
    folder.mkdir()
    (folder / "config.yaml").touch()
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    runs.write_summary(folder, status="queued")


@pytest.fixture
def opened(tmp_path):
    return lambda total, **changed: Study(tmp_path, ASKED | changed, total, "journal")


@pytest.fixture
def work(monkeypatch):
    """Works on a study until the end: the runs that have begun."""

    def run(study, ends=(), deadline=None):
        parts = [workers.Part(label, texts) for label, texts in study.asked["parts"]]
        for name, value in {"ends": dict(ends), "parts": len(parts), "begun": []}.items():
            monkeypatch.setattr(Run, name, value, raising=False)
        monkeypatch.setattr("boltlab.processes.launchers.process.Job", Run)
        monkeypatch.setattr(workers, "WAIT_SECONDS", 0.01)
        places = [workers.Place((), 1)] * 2
        workers.Worker(study, parts, places, make_run, "", deadline, lambda line: None).run(lambda: None)
        return Run.begun

    return run


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_trial_with_which_three_workers_have_died_is_given_up(opened, work, deaths):
    for _ in range(deaths):
        opened(1).take().lock.release()  # as the system does when a worker dies
    study = opened(1)
    assert [run.trial for run in work(study)] == ["0"] * (deaths < 3)
    (t,) = study.trials()
    if deaths == 3:
        assert t.state.name == "FAIL" and FINAL in t.user_attrs
        assert t.user_attrs["reason"] == "its worker was killed 3 times, each time with this trial"
    else:
        assert t.values == [0.5]


def test_where_one_part_dies_the_others_are_stopped_and_the_trial_says_why(opened, work):
    study = opened(1, parts=[["a", []], ["b", []]])
    begun = work(study, {"a": -9, "b": None})
    assert [run.folder.name for run in begun if run.stopped] == ["0-b", "1-b"] and len(begun) == 4
    assert [RETRY in t.user_attrs for t in study.trials()] == [False, True]
    for t in study.trials():
        assert t.state.name == "FAIL" and t.user_attrs["reason"].startswith("killed by SIGKILL")


@pytest.mark.parametrize("pruner", ["NopPruner", "MedianPruner"])
def test_a_value_that_is_no_number_ends_its_trial_and_is_never_the_best(opened, work, pruner):
    study = opened(4, pruner={"_target_": f"optuna.pruners.{pruner}"})
    nan, inf = math.nan, math.inf
    work(study, {"0": [nan, nan], "1": [inf, inf], "2": [nan, 0.25], "3": [0.125, 0.125]})
    found = [(t.state.name, t.user_attrs.get("reason"), t.values) for t in study.trials()]
    assert found[:2] == [("PRUNED", f"val_acc is {value}", None) for value in (nan, inf)]
    assert found[2:] == [("COMPLETE", None, [0.25]), ("COMPLETE", None, [0.125])]
    assert best_of(study, study.trials()).number == 2


@pytest.mark.parametrize("begun", [True, False])
def test_after_the_time_limit_only_what_has_begun_goes_on(opened, work, begun):
    earlier = opened(3)
    left = earlier.take()
    if begun:
        make_run([], earlier.folder(left.number, ""))
    earlier.leave(left)  # by a worker that is requeued
    study = opened(3)
    assert [run.trial for run in work(study, deadline=time.time() - 1)] == ["0"] * begun
    assert [t.state.name for t in study.trials()] == ["COMPLETE" if begun else "RUNNING"]


def damaged(path, before):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)


LOSSES = {
    "gone": (None, lambda path, before: path.unlink()),
    "another file": (None, lambda path, before: path.write_bytes(b"no database\n" * 500)),
    "damaged": (None, damaged),
    "older copy": (None, lambda path, before: path.write_bytes(before)),
    "damaged journal": ("journal", damaged),
    "journal cut off": ("journal", lambda path, before: path.write_bytes(before[:-9])),
}
SPACE = {"opt": "choice(sgd,adam)", "lr": "tag(log,interval(1e-4,1e-1))"}
SPACE |= {"width": "int(interval(1,99))", "m": {"values": "interval(0,1)", "when": "opt=sgd"}}


def of_runs(top):
    """The values of each trial as its run was given them, and its best accuracy."""
    found = {}
    for folder in top.glob("[0-9]*"):
        given = dict(text.split("=") for text in yaml.safe_load((folder / "overrides.yaml").read_text()))
        given = {key: value if key == "opt" else float(value) for key, value in given.items()}
        values = workers.column(folder, "val_acc")
        found[int(folder.name)] = given, max(values, default=None)
    return found


@pytest.mark.parametrize(("storage", "lose"), LOSSES.values(), ids=LOSSES)
def test_a_lost_study_is_named_and_made_anew_from_the_runs(tmp_path, work, storage, lose):
    asked, path = ASKED | {"space": SPACE}, tmp_path / ("study.journal" if storage else "study.db")
    work(Study(tmp_path, asked, 1, storage), {"0": [0.1, 0.2]})
    before = path.read_bytes()
    first = Study(tmp_path, asked, 4, storage)
    work(first, {"1": [0.9, 0.7], "2": [0.4], "3": -9})
    known = of_runs(tmp_path)
    assert [known[number][1] for number in range(5)] == [0.2, 0.9, 0.4, None, 0.5]  # the last is the dead one again
    first.study._storage.remove_session()
    lose(path, before)

    with pytest.raises(UserError, match="rebuild=true makes it anew from the runs there, another name=… begins a new"):
        Study(tmp_path, asked, 6, storage)
    again = Study(tmp_path, asked, 6, storage, anew=True)
    assert sorted(run.folder.name for run in work(again)) == ["3", "5"]
    assert {t.number: (t.params, t.values[0]) for t in again.trials()} == of_runs(tmp_path)
    assert of_runs(tmp_path).items() >= (known | {3: (known[3][0], 0.5)}).items()
    assert best_of(again, again.trials()).number == 1
    assert Study(tmp_path, asked, 6, storage).take() is None
