"""`sweep.engine=vectorized` whole: the trials of a sweep as stacks of nets in one process."""

import csv
import signal
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from omegaconf import OmegaConf

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.compose import compose
from boltlab.ground import signals
from boltlab.sweeps.stack import Stack
from boltlab.sweeps.study import Lost, Study
from boltlab.sweeps.vectorized import _signature

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("sweep.engine=vectorized", "logger=csv", "model=mlp", "data.max_samples=200", "data.batch_size=50")
QUICK += ("trainer.max_epochs=3", "trainer.accelerator=cpu", "sampler=random", "pruner=none")
LR = "optimizer.lr=tag(log,interval(1e-3,1e-1))"


def folder():
    (top,) = (path.parent for path in Path("logs/train").glob("*/sweep.json"))
    return top


def known():
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder()}/study.db")
    return study.get_trials(deepcopy=False)


def rows(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_trials_leave_ordinary_runs(boltlab):
    asked = (*QUICK, "optimizer.lr=1e-3,1e-2", "model.net.hidden_sizes=[8],[16]", "sampler=grid", "test=true")
    code, out, err = boltlab("sweep", *asked, "logger=[csv,tensorboard]")
    assert code == 0, (out, err)
    trials = known()
    assert {t.state.name for t in trials} == {"COMPLETE"} and len(trials) == 4
    for t in trials:
        run = folder() / str(t.number)
        summary = runs.read_summary(run)
        assert summary["status"] == "finished" and summary["epochs"] == 3 and summary["steps"] == 12
        assert summary["stack"] == 2, "one for each architecture"
        logged = rows(run)
        assert [float(row["step"]) for row in logged[:3]] == [3, 7, 11]
        assert float(logged[-1]["test_acc"]) == pytest.approx(summary["test"]["test_acc"])
        assert t.value == max(float(row["val_acc"]) for row in logged if row["val_acc"])
        assert summary["best"]["val_acc"] == t.value and summary["test"].keys() >= {"test_loss", "test_f1"}
        assert runs.load_config(run).optimizer.lr == float(t.params["optimizer.lr"])
        assert runs.read_json(run / "data.json")["splits"].keys() == {"train", "val", "test"}
        assert b"test_acc" in next(run.rglob("events.out*")).read_bytes()

    run = folder() / "2"
    code, out, err = boltlab("eval", f"run={run}", "split=val", "trainer.accelerator=cpu", "logger=csv")
    assert code == 0, err
    (evaluated,) = (runs.read_summary(p) for p in Path("logs/eval").iterdir())
    assert evaluated["test"]["val_acc"] == pytest.approx(trials[2].value, abs=1e-6)
    for status in ("failed", "interrupted", "finished"):
        runs.write_summary(run, status=status)
        code, out, err = boltlab("train", f"resume={run}", "trainer.max_epochs=5")
        assert code == 1 and f"is {status}, and no checkpoint of it can be resumed" in err and "init_from=" in err
        assert runs.read_summary(run)["status"] == status
    written, best = OmegaConf.load(folder() / "best.yaml"), max(trials, key=lambda t: (t.value, -t.number)).params
    assert f"{written.optimizer.lr:g}" == f"{float(best['optimizer.lr']):g}"
    assert str(written.model.net.hidden_sizes) == best["model.net.hidden_sizes"]


def test_a_pruner_ends_some_of_a_stack(boltlab, monkeypatch):
    report, calls = Study.report, []

    def told(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Lost  # the trial is begun again when the others are done
        return report(*arguments)

    monkeypatch.setattr(Study, "report", told)
    code, out, err = boltlab("sweep", *QUICK, LR, "sweep.trials=8", "pruner=asha", "workers=8", "trainer.max_epochs=5")
    assert code == 0, (out, err)
    assert "trial 1 was taken over by another worker" in out
    by_state = {name: [t for t in known() if t.state.name == name] for name in ("COMPLETE", "PRUNED")}
    assert all(by_state.values()) and sum(map(len, by_state.values())) == 8
    for t in by_state["PRUNED"]:
        run = folder() / str(t.number)
        summary = runs.read_summary(run)
        assert summary["status"] == "pruned" and summary["epochs"] == len(rows(run)) < 5
        assert checkpoint_file.read(run / "checkpoints/last.ckpt")["Digits"]["fitted"]
    for t in by_state["COMPLETE"]:
        assert len(rows(folder() / str(t.number))) == 5


def test_the_mean_over_seeds_is_the_value(boltlab):
    code, out, err = boltlab(
        "sweep", *QUICK, "optimizer.lr=1e-3,1e-2", "sampler=grid", "seeds=2", "trainer.max_epochs=2"
    )
    assert code == 0, (out, err)
    for t in known():
        values = [runs.read_summary(folder() / f"{t.number}-seed{s}")["best"]["val_acc"] for s in (0, 1)]
        assert t.value == pytest.approx(np.mean(values))
        assert t.user_attrs["deviation"] == pytest.approx(np.std(values, ddof=1)) and values[0] != values[1]


def test_one_that_diverges_leaves_the_others_alone(boltlab):
    lr = "optimizer.lr=1e-2,1e30"
    code, out, err = boltlab("sweep", *QUICK, "optimizer=sgd", "sampler=grid", lr, "trainer.max_epochs=2")
    assert code == 0, (out, err)
    good, bad = sorted(known(), key=lambda t: float(t.params["optimizer.lr"]))
    assert (
        good.state.name == "COMPLETE" and bad.state.name == "PRUNED" and "diverged in epoch" in bad.user_attrs["reason"]
    )
    assert runs.read_summary(folder() / str(bad.number))["error"] == "NonFiniteLoss"


def test_the_same_command_begins_again_what_was_stopped(boltlab, monkeypatch):
    asked = (*QUICK, LR, "sweep.trials=4", "workers=2")
    whole, calls = Stack.train_epoch, []

    def stops(self, epoch, watch):
        calls.append(epoch)
        if len(calls) == 5:  # the second stack's second epoch
            signals.inbox.stop = signal.SIGTERM
        return whole(self, epoch, watch)

    monkeypatch.setattr(Stack, "train_epoch", stops)
    assert boltlab("sweep", *asked)[0] == 128 + signal.SIGTERM
    assert [t.state.name for t in known()] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert runs.read_summary(folder() / "3")["status"] == "interrupted"
    before = [t.params for t in known()]
    code, out, err = boltlab("sweep", *asked)
    assert code == 0 and "resumes" in out, (out, err)
    assert [t.params for t in known()] == before and {t.state.name for t in known()} == {"COMPLETE"}
    assert len(calls) == 5 + 3


def test_a_trial_with_which_three_commands_were_killed_is_given_up(boltlab, monkeypatch):
    asked = (*QUICK, LR, "sweep.trials=3", "workers=2")

    def stops(self, epoch, watch):
        signals.inbox.stop = signal.SIGTERM
        watch()

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "train_epoch", stops)
        assert boltlab("sweep", *asked)[0] == 128 + signal.SIGTERM
    for _ in range(3):  # what was left by a command that could say so is not counted
        content = runs.read_json(folder() / "sweep.json")["asked"]
        claimed = Study(folder().resolve(), content, 3, None).take()
        claimed.lock.release()  # as the system does with a process that is killed
    code, out, err = boltlab("sweep", *asked)
    assert code == 0 and "trial 0 died: its worker was killed 3 times, each time with this trial" in out, (out, err)
    assert [t.state.name for t in known()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_stack_that_does_not_fit_says_so(boltlab, monkeypatch):
    def full(self, epoch, watch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Stack, "train_epoch", full)
    code, _, err = boltlab("sweep", *QUICK, LR, "sweep.trials=4")
    assert code == 1 and "4 nets at once do not fit" in err and "workers=2" in err
    assert {t.state.name for t in known()} == {"RUNNING"}, "the same command, with fewer workers, takes them"
    assert runs.read_summary(folder() / "0")["status"] == "failed"


def test_what_a_stack_does_not_do_is_refused_by_name(boltlab):
    asked = ["callbacks=[default,early_stopping]", "trainer.gradient_clip_val=1.0", "optimizer=adam,rmsprop"]
    asked += ["model.net.dropout=0.0,0.1", "scheduler=plateau", "precision=16-mixed", "compile=true", "folds=3"]
    code, out, err = boltlab("sweep", *QUICK, *asked, "sweep.objectives={val_acc: max, latency_ms: min}")
    assert code == 2, (out, err)
    for word in ("callbacks.early_stopping", "trainer.gradient_clip_val", "RMSprop", "dropout", "Plateau", "folds"):
        assert word in err, (word, err)
    for word in ("latency_ms", "precision=16-mixed", "compile=True", "sweep.engine=optuna can"):
        assert word in err, (word, err)
    code, out, err = boltlab("sweep", *QUICK, "optimizer=sgd", "optimizer.momentum=0.0,0.9")
    assert code == 2 and "Nesterov momentum requires" in err, (out, err)
    asked = ["data.batch_size=auto", "trainer.accelerator=mps", "monitor=train_loss_step", "mode=min"]
    code, out, err = boltlab("sweep", *QUICK, LR, *asked)
    assert code == 2, (out, err)
    for word in ("data.batch_size", "accelerator=mps", "monitor=train_loss_step"):
        assert word in err, (word, err)
    code, out, err = boltlab("sweep", *QUICK, LR, "optimizer=adam", "++optimizer.amsgrad=true", "model.mixup_alpha=0.2")
    assert code == 2 and "optimizer.amsgrad" in err and "mixup" in err, (out, err)
    assert not Path("logs").exists()


def test_what_follows_the_seed_beside_the_order_makes_stacks_of_its_own():
    asked = ["model=mlp", "data.split_seed=${seed}"]
    for texts, stacks in ((asked[:1], 1), (asked, 2)):
        configs = [compose("train", [*texts, f"seed={n}", f"optimizer.lr={n + 1}"]).config for n in (0, 1)]
        assert len(set(map(_signature, configs))) == stacks
