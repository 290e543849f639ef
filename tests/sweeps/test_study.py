"""Who may take which trial, what counts, and what the live table shows of it; nothing is trained."""

import io
import platform
import threading
import time
from contextlib import nullcontext

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from rich.console import Console

from boltlab.ground.errors import UserError
from boltlab.ground.files import read_json
from boltlab.sweeps import table as tables
from boltlab.sweeps.study import FINAL, RETRY, SAME, Lost, Study, begin, counts, definition
from boltlab.sweeps.worker import State

ASKED = {
    "name": "s",
    "train": [],
    "space": {"lr": "tag(log,interval(1e-4,1e-1))"},
    "objectives": {"val_acc": "max"},
    "sampler": {"_target_": "optuna.samplers.RandomSampler"},
    "pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 1, "n_warmup_steps": 0},
    "parts": [["", []]],
    "validations": 3,
    "seed": 0,
}


@pytest.fixture(params=[None, "journal"], ids=["sqlite", "journal"])
def opened(request, tmp_path):
    def make(total=3, key="", **changed):
        return Study(tmp_path, ASKED | changed, total, request.param, key)

    return make


def test_two_workers_take_different_trials_and_no_more_than_asked_for(opened):
    first, second = opened(), opened(key="other")
    taken = [first.take(), second.take(), first.take(), second.take()]
    assert taken[3] is None and [claimed.number for claimed in taken[:3]] == [0, 1, 2]
    assert len({claimed.params["lr"] for claimed in taken[:3]}) == 3
    first.complete(taken[0], [0.5])
    assert second.take() is None and sum(map(counts, second.trials())) == 3


def test_many_threads_share_one_study(opened):
    study = opened(total=12)
    taken = []

    def work():
        while (claimed := study.take()) is not None:
            taken.append(claimed.number)
            study.complete(claimed, [0.1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(taken) == list(range(12)) and len({t.params["lr"] for t in study.trials()}) == 12


def test_a_trial_whose_worker_is_gone_is_taken_over_as_it_is(opened):
    gone, other = opened(), opened(key="other")
    claimed = gone.take()
    gone.report(claimed, 0.3, 1)
    assert other.take().number == 1  # the first is at work
    claimed.lock.release()  # as the system does when its process ends
    again = other.take()
    assert (again.number, again.params, again.reported) == (0, claimed.params, 1)
    assert not other.report(again, 0.9, 1)  # told before
    assert list(other.trials()[0].intermediate_values.values()) == [0.3]


def test_one_of_another_machine_is_gone_after_five_minutes_without_a_sign(opened, monkeypatch):
    study = opened(total=1)
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    claimed = study.take()
    claimed.lock.release()  # a lock that this machine does not see
    monkeypatch.setattr(platform, "node", lambda: "here")
    here = opened(total=1, key="other")
    assert here.others()
    assert here.take() is None
    claimed.trial.set_user_attr("alive", time.time() - 400)
    taken = here.take()
    assert taken.number == 0 and taken.taken == 1
    monkeypatch.setattr(platform, "node", lambda: "third")
    taken.lock.release()
    assert opened(total=1, key="third").take() is None  # the one that took it over has just said so
    here.complete(taken, [0.5])
    with pytest.raises(Lost):
        study.complete(claimed, [0.5])


def test_one_that_was_left_is_for_anybody_at_once(opened, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    study = opened(total=1)
    study.leave(study.take())
    monkeypatch.setattr(platform, "node", lambda: "here")
    taken = opened(total=1, key="other").take()
    assert taken.number == 0 and taken.taken == 0


@pytest.mark.parametrize("sampler", ["RandomSampler", "BruteForceSampler"])
@pytest.mark.parametrize("drawn", [0, 1])
def test_one_whose_worker_was_killed_while_it_drew_is_drawn_to_the_end(opened, sampler, drawn, monkeypatch):
    space = {"a": "1,2", "b": "x,y"}
    changed = {"space": space, "sampler": {"_target_": f"optuna.samplers.{sampler}"}}
    gone = opened(total=4, **changed)
    with gone._asking():
        trial = gone.study.ask()
        for dimension in gone.space[:drawn]:
            dimension.suggest(trial)
    study = opened(total=4, key="other", **changed)
    found = []
    while (claimed := study.take()) is not None:
        found.append(tuple(claimed.params[key] for key in "ab"))
        study.complete(claimed, [0.0])
    assert sorted(found) == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]


def test_what_dies_is_tried_once_more_and_then_counts(opened):
    study = opened(total=1)
    claimed = study.take()
    assert study.fail(claimed, "killed by SIGKILL")
    again = study.take()
    assert again.params == claimed.params and again.trial.user_attrs[RETRY] == claimed.number
    assert counts(study.trials()[1]) and not counts(study.trials()[0])
    assert not study.fail(again, "killed by SIGKILL") and study.take() is None
    states = [(t.state, t.user_attrs.get("reason"), FINAL in t.user_attrs) for t in study.trials()]
    assert states == [(TrialState.FAIL, "killed by SIGKILL", False), (TrialState.FAIL, "killed by SIGKILL", True)]


def test_a_point_of_a_finite_space_is_taken_once(opened):
    study = opened(total=50, space={"a": "1,2", "b": "x,y"})
    found = []
    while (claimed := study.take()) is not None:
        found.append(tuple(claimed.params.values()))
        study.complete(claimed, [0.0])
    assert sorted(found) == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]
    assert all(t.state is TrialState.COMPLETE for t in study.trials() if SAME in t.user_attrs)


@pytest.mark.slow
def test_the_last_points_of_a_finite_space_are_found_without_luck(opened):
    study = opened(total=60, space={"a": "range(0,30,1)", "b": "x,y"})
    found = set()
    while (claimed := study.take()) is not None:
        found.add(tuple(claimed.params.values()))
        study.complete(claimed, [0.0])
    assert len(found) == 60


def test_the_pruner_sees_what_is_reported(opened):
    study = opened(total=3)
    good, bad = study.take(), study.take()
    assert not any(study.report(good, value, step) for step, value in ((1, 0.5), (2, 0.9)))
    study.complete(good, [0.9])
    assert [study.report(bad, value, step) for step, value in ((1, 0.6), (2, 0.7))] == [False, True]
    study.prune(bad, reason="pruned at epoch 2")
    assert study.trials()[1].state is TrialState.PRUNED and counts(study.trials()[1])


def test_alone_a_sweep_repeats_itself_and_another_process_draws_something_else(tmp_path):
    drawn = {}
    for name, key in (("a", ""), ("b", ""), ("c", "worker 1")):
        (tmp_path / name).mkdir()
        drawn[name] = Study(tmp_path / name, ASKED, 3, None, key).take().params["lr"]
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_two_folders_that_share_a_database_share_a_study_and_draw_different_samples(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    studies = [Study(tmp_path / name, ASKED, 3, f"sqlite:///{tmp_path}/shared.db") for name in "ab"]
    taken = [study.take() for study in studies]
    assert [claimed.number for claimed in taken] == [0, 1]
    assert taken[0].params["lr"] != taken[1].params["lr"]


def test_a_sweep_is_found_by_all_that_it_asks_for(tmp_path):
    folder = tmp_path / "train" / "2026_s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(f'{{"of": "{definition(ASKED)}", "started": 7}}')
    (tmp_path / "train" / "2027_broken").mkdir()
    (tmp_path / "train" / "2027_broken" / "sweep.json").write_text("[")
    assert begin(tmp_path, ASKED, {}) == (folder, True)
    assert read_json(folder / "sweep.json") == {"of": definition(ASKED), "started": 7, "asked": ASKED}
    other, goes_on = begin(tmp_path, ASKED | {"seed": 1}, {})
    assert other != folder and not goes_on


def test_commands_that_begin_a_sweep_at_the_same_moment_share_it(tmp_path):
    together, opened, going_on, errors = threading.Barrier(4), [], [], []

    def work(key):
        together.wait()
        try:
            top, goes_on = begin(tmp_path, ASKED, {})
            going_on.append(goes_on)
            opened.append(Study(top, ASKED, 3, None, key))
        except UserError as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(f"{i}",)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    taken = [study.take() for study in opened]
    assert not errors and sorted(going_on) == [False, True, True, True]
    assert [claimed and claimed.number for claimed in taken] == [0, 1, 2, None]


@pytest.mark.parametrize(("failures", "opens"), [(2, True), (3, False)])
def test_who_finds_its_tables_made_by_another_looks_again(tmp_path, monkeypatch, failures, opens):
    left = [sqlalchemy.exc.IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed"))] * failures

    class Storage(optuna.storages.RDBStorage):
        def __init__(self, *arguments, **keywords):
            if left:
                raise left.pop()
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr("optuna.storages.RDBStorage", Storage)
    monkeypatch.setattr("boltlab.sweeps.study.time.sleep", lambda _: None)
    with nullcontext() if opens else pytest.raises(UserError, match="cannot be opened: IntegrityError"):
        assert Study(tmp_path, ASKED, 1, f"sqlite:///{tmp_path}/shared.db").take().number == 0


def test_a_storage_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        Study(tmp_path, ASKED, 1, "nonsense")


def test_the_table_shows_trials_at_work_the_best_and_the_time_left(opened):
    study = opened(total=4)
    shown = tables.Table(study, workers=1, live=True)
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=160, markup=False)
    shown._shows_live = True
    best, dead, work = study.take(), study.take(), study.take()
    study.report(best, 0.75, 1)
    study.complete(best, [0.75], deviation=0.01)
    study.fail(dead, "RuntimeError: [no] markup")
    with shown.shown({work.number: State(work.params, epoch=3, value=0.625, part="seed1")}):
        shown.update()
    text = shown.console.file.getvalue()
    assert "0.7500 * ± 0.0100" in text and "3 of seed1" in text and "0.6250" in text
    assert "RuntimeError: [no] markup" in text and "1 of 4, best val_acc 0.7500 of trial 0" in text and "left" in text


def test_elsewhere_a_line_is_printed_for_each_trial_that_ends(opened, capsys):
    study = opened(total=2)
    study.complete(study.take(), [0.5])
    tables.Table(study, workers=1, live=True).say("trial 0 finished: 0.5000")
    assert "trial 0 finished: 0.5000  (1 of 2, best val_acc 0.5000 of trial 0" in capsys.readouterr().out
