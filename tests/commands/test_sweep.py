"""`boltlab sweep` whole: what it tries, what it survives, and what it leaves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from pausing import pause
from waiting import HANG, until
from warm import differences, outcome

from boltlab import runs
from boltlab.commands import sweep as command
from boltlab.config import trust
from boltlab.config.compose import compose
from boltlab.sweeps import spec as specs
from boltlab.sweeps import study as studies

pytestmark = pytest.mark.floats

QUICK = ("logger=none", "model=mlp", "data.batch_size=128", "trainer.max_epochs=3", "trainer.accelerator=cpu")
QUICK += ("trainer.enable_progress_bar=false", "callbacks=[best,last]", "trainer.log_every_n_steps=1", "workers=2")
LR = ("optimizer.lr=tag(log,interval(1e-3,1e-1))", "sampler=random", "pruner=none")


QUICK_LENET = (*(text for text in QUICK if text != "model=mlp"), "trainer.max_epochs=1")


def folder():
    (top,) = (path.parent for path in Path("logs/train").glob("*/sweep.json"))
    return top


def study(top=None):
    top = top or folder()
    return optuna.load_study(study_name=None, storage=f"sqlite:///{top}/study.db")


def known(top=None):
    return study(top).get_trials(deepcopy=False)


def comparable(path):
    """A run's config without where it stands."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    return {key: value for key, value in config.items() if key not in ("run_dir", "name", "log_dir", "test")}


@pytest.mark.slow
def test_a_sweep_from_a_file_prunes_and_leaves_its_best_as_an_experiment(boltlab, configs):
    code, out, err = boltlab("sweep", "sweep=digits", "sweep.trials=9", *QUICK, "pruner=asha")
    assert code == 0, (out, err)
    top, trials = folder(), known()
    assert [t.number for t in trials] == list(range(9))
    states = {t.state.name for t in trials}
    assert states == {"COMPLETE", "PRUNED"}, out
    for t in trials:
        summary = runs.read_summary(top / str(t.number))
        if t.state.name == "COMPLETE":
            assert summary["status"] == "finished" and t.value == pytest.approx(summary["best"]["val_acc"])
            assert len(t.intermediate_values) == 3
        else:
            assert summary["status"] == "pruned" and "pruned at epoch" in summary["reason"]
            assert (top / str(t.number) / "checkpoints" / "last.ckpt").exists()  # it could go on
        config = yaml.safe_load((top / str(t.number) / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == t.params["optimizer.lr"]
        assert config["optimizer"]["_target_"].endswith({"sgd": "SGD", "adamw": "AdamW"}[t.params["optimizer"]])
        assert ("optimizer.momentum" in t.params) == (t.params["optimizer"] == "sgd")
    for name in ("report.html", "history.png", "importance.png", "slices.png", "parallel.png"):
        assert (top / name).stat().st_size > 5000, name
    page = (top / "report.html").read_text()
    assert "src=" not in page.split("</script>")[-1] and page.count("Plotly.newPlot") >= 5
    assert sum(line.count("pruned") for line in boltlab("runs")[1].splitlines()) >= 1

    best = max((t for t in trials if t.state.name == "COMPLETE"), key=lambda t: t.value)
    (configs / "experiment" / "digits_best.yaml").write_text((top / "best.yaml").read_text())
    assert boltlab("train", "experiment=digits_best", "log_dir=again")[0] == 0
    (again,) = Path("again/train").iterdir()
    assert comparable(again) == comparable(top / str(best.number))
    assert runs.read_summary(again)["best"]["val_acc"] == best.value


@pytest.mark.slow
def test_a_key_in_a_list_and_an_experiment_stand_in_the_best_config(boltlab, configs):
    space = ("model.net.hidden_sizes.0=32,64", "optimizer=sgd,adamw", "sampler=grid", "sweep.trials=3")
    code, out, err = boltlab(
        "sweep", "experiment=digits_quickstart", *[q for q in QUICK if q != "model=mlp"], *space, "trainer.max_epochs=1"
    )
    assert code == 0, (out, err)
    (configs / "experiment" / "found.yaml").write_text((folder() / "best.yaml").read_text())
    composed = compose("train", ["experiment=found"]).config
    best = max((t for t in known() if t.values), key=lambda t: t.value)
    saved = yaml.safe_load((folder() / str(best.number) / "config.yaml").read_text())
    assert composed.model.net.hidden_sizes == saved["model"]["net"]["hidden_sizes"]
    assert composed.optimizer._target_ == saved["optimizer"]["_target_"]
    assert composed.optimizer.lr == saved["optimizer"]["lr"]


@pytest.mark.slow
def test_the_same_command_adds_trials_and_none_is_drawn_twice(boltlab):
    command = ("sweep", *QUICK, *LR, "trainer.max_epochs=1", "workers=1")
    assert boltlab(*command, "sweep.trials=2")[0] == 0
    code, out, _ = boltlab(*command, "sweep.trials=4")
    assert code == 0 and "resumes" in out
    drawn = [t.params["optimizer.lr"] for t in known()]
    assert len(drawn) == len(set(drawn)) == 4
    code, out, _ = boltlab(*command, "sweep.trials=4")
    assert code == 0 and "all trials of this command are done (4), nothing runs" in out and len(known()) == 4
    assert boltlab(*command, "sweep.trials=2", "log_dir=again")[0] == 0  # alone, a sweep repeats itself
    (again,) = (path.parent for path in Path("again/train").glob("*/sweep.json"))
    assert [t.params["optimizer.lr"] for t in known(again)] == drawn[:2]


@pytest.mark.slow
def test_a_grid_is_complete_and_has_nothing_twice(boltlab):
    space = ("optimizer=sgd,adamw", "data.batch_size=64,128", "sampler=grid", "pruner=none")
    code, out, err = boltlab("sweep", *QUICK, *space, "trainer.max_epochs=1")
    assert code == 0, (out, err)
    points = {(t.params["optimizer"], t.params["data.batch_size"]) for t in known()}
    assert len(points) == 4 and sum(map(studies.counts, known())) == 4


def test_a_finite_space_ends_a_sweep_whatever_the_sampler(boltlab):
    space = ("data.batch_size=64,128", "sampler=random", "pruner=none", "sweep.trials=50")
    code, out, err = boltlab("sweep", *QUICK, *space, "trainer.max_epochs=1")
    assert code == 0, (out, err)
    ran = [t for t in known() if studies.SAME not in t.user_attrs]
    assert sorted(t.params["data.batch_size"] for t in ran) == ["128", "64"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "cmaes", "qmc"])
def test_every_sampler_proposes(boltlab, sampler):
    more = (f"sampler={sampler}", "trainer.max_epochs=1", "sweep.trials=3", "pruner=hyperband")
    startup = ("sampler.n_startup_trials=1",) if sampler != "qmc" else ()
    code, out, err = boltlab("sweep", *QUICK, LR[0], "optimizer.weight_decay=interval(0.0,0.1)", *more, *startup)
    assert code == 0, (out, err)
    assert len({t.params["optimizer.lr"] for t in known()}) == 3


@pytest.mark.slow
def test_seeds_are_a_mean_with_its_deviation_and_the_pruner_sees_the_mean(boltlab):
    code, out, err = boltlab("sweep", *QUICK, LR[0], "seeds=2", "sweep.trials=2", "pruner=median", "seed=5")
    assert code == 0, (out, err)
    for t in known():
        values = [runs.read_summary(folder() / f"{t.number}-seed{s}")["best"]["val_acc"] for s in (5, 6)]
        assert t.value == pytest.approx(sum(values) / 2)
        assert t.user_attrs["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        series = [list_of(folder() / f"{t.number}-seed{s}", "val_acc") for s in (5, 6)]
        expected = [*series[0], *((a + b) / 2 for a, b in zip(*series, strict=True))]
        assert [t.intermediate_values[i + 1] for i in range(6)] == pytest.approx(expected)


def list_of(run, name):
    from boltlab.sweeps.worker import column

    return column(run, name)


@pytest.mark.slow
def test_several_objectives_end_in_a_front(boltlab):
    space = ("model.net.hidden_sizes=[16],[256]", "sampler=grid", "pruner=none", "trainer.max_epochs=1")
    objectives = "sweep.objectives={val_acc: max, parameters: min, latency_ms: min}"
    code, out, err = boltlab("sweep", *QUICK, *space, objectives)
    assert code == 0, (out, err)
    by_size = {t.params["model.net.hidden_sizes"]: t.values for t in known()}
    assert by_size["[16]"][1] == 784 * 16 + 16 + 16 * 10 + 10 < by_size["[256]"][1]
    assert all(0 < values[2] < 1000 for values in by_size.values())
    signed = {t.number: (-t.values[0], *t.values[1:]) for t in known()}  # of each the smaller the better
    front = [
        n for n, mine in signed.items()
        if not any(o != mine and all(a <= b for a, b in zip(o, mine, strict=True)) for o in signed.values())
    ]  # fmt: skip
    assert f"no other is better in all: trials {', '.join(map(str, front))}\n" in out
    assert (folder() / "pareto.png").exists()


@pytest.mark.slow
def test_after_the_time_limit_nothing_begins_not_even_in_a_worker_that_is_requeued(boltlab, capsys, monkeypatch):
    code, out, err = boltlab("sweep", *QUICK, *LR, "sweep.trials=2", "sweep.timeout_minutes=1e-9")
    assert code == 1 and "came to its end" in err and not known(), (out, err)
    content = runs.read_json(folder() / "sweep.json")
    runs.write_json(folder() / "sweep.json", content | {"timeout_minutes": 30})
    place = folder() / "workers" / "0"
    place.mkdir(parents=True)
    runs.write_summary(place, status="queued", begun=time.time() - 3600)
    assert command.work(place) == 0
    assert not known() and runs.read_summary(place)["status"] == "finished"

    again = studies.Study(folder(), content["asked"], 2, None)
    again.complete(again.take(), [0.5])
    again.leave(again.take())  # what waits is at work nowhere
    for function in ("write", "show"):
        monkeypatch.setattr(f"boltlab.sweeps.report.{function}", lambda _: None)
    assert command._end(again) == 0 and "1 of 2 trials; the same command resumes" in capsys.readouterr().out


FAULTY = """
import os
from contextlib import suppress
from pathlib import Path
from lightning.pytorch import Callback

class Fault(Callback):
    def __init__(self, kind, lr):
        self.kind, self.lr = kind, lr

    def on_train_epoch_end(self, trainer, module):
        here = trainer.optimizers[0].param_groups[0]["initial_lr"]
        if self.kind == "raise" and here > self.lr:
            raise RuntimeError("what went wrong")
        if self.kind == "kill":
            with suppress(FileExistsError):  # one of two at once
                Path("killed").touch(exist_ok=False)
                os.kill(os.getpid(), 9)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.kind == "poison":
            next(module.parameters()).data.fill_(float("nan"))
"""


def fault(tmp_path, kind, lr=0.0):
    (tmp_path / "faulty_trial.py").write_text(FAULTY)
    return (
        "+callbacks.fault._target_=faulty_trial.Fault",
        f"+callbacks.fault.kind={kind}",
        f"+callbacks.fault.lr={lr}",
    )


def start(warm, tmp_path, *arguments):
    return warm("sweep", *QUICK, *arguments, before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")


@pytest.mark.faults
def test_a_killed_trial_costs_itself_and_is_tried_again(warm, tmp_path):
    child = start(warm, tmp_path, *LR, "trainer.max_epochs=1", "sweep.trials=3", *fault(tmp_path, "kill")).wait()
    assert child.code == 0, (child.stdout, child.stderr)
    (dead,) = (t for t in known() if t.state.name == "FAIL")
    (again,) = (t for t in known() if t.user_attrs.get(studies.RETRY) == dead.number)
    assert dead.user_attrs["reason"].startswith("killed by SIGKILL") and again.params == dead.params
    assert runs.read_summary(folder() / str(dead.number))["reason"] == "killed by SIGKILL"
    assert sum(t.state.name == "COMPLETE" for t in known()) == 3


@pytest.mark.faults
def test_a_trial_that_raises_is_recorded_and_given_up_after_the_second_time(warm, tmp_path):
    space = ("optimizer.lr=0.001,0.1", "sampler=grid", "pruner=none", "trainer.max_epochs=1", "workers=1")
    child = start(warm, tmp_path, *space, *fault(tmp_path, "raise", 0.01)).wait()
    assert child.code == 0, (child.stdout, child.stderr)
    dead = [t for t in known() if t.state.name == "FAIL" and studies.SAME not in t.user_attrs]
    assert [t.params["optimizer.lr"] for t in dead] == ["0.1", "0.1"]
    assert all("RuntimeError: what went wrong" in t.user_attrs["reason"] for t in dead)
    assert "died, twice" in child.stdout


@pytest.mark.faults
def test_where_no_trial_lives_the_sweep_ends_with_the_reason(warm, tmp_path):
    child = start(warm, tmp_path, *LR, "sweep.trials=40", *fault(tmp_path, "raise")).wait()
    assert child.code == 1 and "what went wrong" in child.stderr and len(known()) < 10


@pytest.mark.faults
def test_a_diverged_trial_is_not_tried_again(warm, tmp_path):
    more = ("callbacks=[nan_guard,best,last]", "sweep.trials=2", *fault(tmp_path, "poison"))
    child = start(warm, tmp_path, *LR, *more).wait()
    assert child.code == 1 and "diverged" in child.stdout, (child.stdout, child.stderr)
    assert [t.state.name for t in known()] == ["PRUNED"] * 2


def at_work(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_was_stopped_goes_on_with_its_trials_to_the_same_bits(
    warm, boltlab, tmp_path, monkeypatch, signum, request
):
    command = (*LR, "sweep.trials=3", *pause(tmp_path, 14))
    first = start(warm, tmp_path, *command)
    for number in "01":
        first.wait_for(tmp_path, f"logs/train/*/{number}/paused")
    pids = [int((folder() / number / "paused").read_text()) for number in "01"]
    os.kill(first.pid, signum)
    assert first.wait().code == (-9 if signum == signal.SIGKILL else 143), first.stderr
    until(lambda: not any(map(at_work, pids)))  # no trial outlives its sweep
    assert [t.state.name for t in known()] == ["RUNNING"] * 2
    drawn = [t.params for t in known()]

    again = start(warm, tmp_path, *command)
    again.wait_for(tmp_path, "logs/train/*/2/paused")
    (folder() / "2" / "paused").unlink()  # and it is not to wait again
    os.kill(again.pid, signal.SIGTERM)
    assert again.wait().code == 143
    (folder() / "2" / "paused").touch()
    last = start(warm, tmp_path, *command).wait()
    assert last.code == 0, (last.stdout, last.stderr)
    assert [t.state.name for t in known()] == ["COMPLETE"] * 3 and [t.params for t in known()[:2]] == drawn
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("boltlab.config.trust.PACKAGES", ("pausing_callback", *trust.PACKAGES))
    cores, threads = torch.get_num_threads(), json.loads((folder() / "0" / "environment.json").read_text())["threads"]
    request.addfinalizer(lambda: torch.set_num_threads(cores))
    torch.set_num_threads(threads)  # which the bits depend on
    for number in "01":
        lr = known()[int(number)].params["optimizer.lr"]
        resumed = runs.read_summary(folder() / number).get("resumed", [])
        assert len(resumed) >= (signum == signal.SIGTERM)
        code, _, err = boltlab("train", *QUICK[:-1], f"optimizer.lr={lr!r}", "test=false", f"log_dir=whole{number}")
        assert code == 0, err
        (whole,) = Path(f"whole{number}/train").iterdir()
        assert differences(outcome(folder() / number), outcome(whole)) == []


@pytest.mark.faults
def test_a_second_command_helps_the_first(warm, tmp_path):
    command = (*LR, "sweep.trials=3", "workers=1", *pause(tmp_path, 14))
    first = start(warm, tmp_path, *command)
    first.wait_for(tmp_path, "logs/train/*/0/paused")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    program = [sys.executable, "-m", "boltlab", "sweep", *QUICK, *command]
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    with subprocess.Popen(program, env={**kept, "PYTHONPATH": path}, stderr=subprocess.DEVNULL) as helper:
        first.wait_for(tmp_path, "logs/train/*/1/paused")
        assert [t.state.name for t in known()] == ["RUNNING"] * 2  # each at one, and none at the other's
        helper.send_signal(signal.SIGINT)
        assert helper.wait(HANG) == 130
    first.send(signal.SIGINT)
    assert first.wait().code == 130
    assert len({t.params["optimizer.lr"] for t in known()}) == 2


@pytest.mark.slow
def test_the_dashboard_opens_the_study(boltlab):
    assert boltlab("sweep", *QUICK, *LR, "trainer.max_epochs=1", "sweep.trials=2")[0] == 0
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        pytest.skip("optuna-dashboard is not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = ("--host", "127.0.0.1", "--port", str(port))

    def summaries():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=HANG) as answer:
                return json.load(answer)["study_summaries"]
        except OSError:
            return None

    with subprocess.Popen([program, f"sqlite:///{folder()}/study.db", *address], stderr=subprocess.DEVNULL) as server:
        try:
            (summary,) = until(summaries, server)
            assert summary["study_name"] == folder().name
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/1?after=0", timeout=HANG) as answer:
                assert len(json.load(answer)["trials"]) == 2
        finally:
            server.terminate()


@pytest.mark.slow
def test_cross_validation_is_a_mean_over_folds(boltlab):
    code, out, err = boltlab("sweep", "sweep=kfold", "folds=3", *QUICK, "trainer.max_epochs=2")
    assert code == 0, (out, err)
    (t,) = known()
    values = [runs.read_summary(folder() / f"0-fold{f}")["best"]["val_acc"] for f in range(3)]
    assert t.value == pytest.approx(sum(values) / 3) and t.user_attrs["parts"] == {
        f"fold{f}": value for f, value in enumerate(values)
    }
    assert "±" in out and "fold2" in out


@pytest.mark.slow
def test_values_that_do_not_go_together_cost_their_own_trial(boltlab):
    """Only together are they a mistake, which the check of each by itself does not see."""
    space = ("precision=32,16-true", "+optimizer.eps=1e-4,1e-8", "sampler=grid", "pruner=none")
    code, out, err = boltlab("sweep", *QUICK, *space, "trainer.max_epochs=1")
    assert code == 0, (out, err)
    states = {(t.params["precision"], float(t.params["+optimizer.eps"])): t.state.name for t in known()}
    assert states.pop(("'16-true'", 1e-8)) == "FAIL" and set(states.values()) == {"COMPLETE"} and len(known()) == 4
    (dead,) = (t for t in known() if t.state.name == "FAIL")
    assert "float16 rounds it to 0" in dead.user_attrs["reason"] and not (folder() / str(dead.number)).exists()


@pytest.mark.slow
def test_a_run_that_was_made_in_part_is_made_anew(boltlab):
    words = ("sweep", *QUICK, *LR, "trainer.max_epochs=1", "workers=1")
    assert boltlab(*words, "sweep.trials=1")[0] == 0
    (folder() / "1").mkdir()
    (folder() / "1" / ".run").touch()  # killed before there was a config
    assert boltlab(*words, "sweep.trials=2")[0] == 0
    assert [t.state.name for t in known()] == ["COMPLETE"] * 2


def test_the_command_line_narrows_what_a_file_searches():
    sweep = studies.Sweep(
        train=["model=mlp"],
        space={
            "optimizer": "choice(sgd,adamw)",
            "optimizer.lr": "interval(0.1,1.0)",
            "optimizer.momentum": {"values": "interval(0.5,0.9)", "when": "optimizer=sgd, rmsprop"},
        },
    )

    def space(*arguments):
        return specs._space(sweep, list(arguments))

    fixed, left = space("optimizer.lr=0.3", "model=cnn")
    assert fixed == ["model=mlp", "optimizer.lr=0.3", "model=cnn"] and list(left) == ["optimizer", "optimizer.momentum"]
    assert space("optimizer=sgd")[1]["optimizer.momentum"] == {"values": "interval(0.5,0.9)"}
    assert "optimizer.momentum" not in space("optimizer=adamw")[1]
    assert "optimizer.momentum" not in space("optimizer=adamw,adam")[1]
    assert space("optimizer=rmsprop,adam")[1]["optimizer.momentum"]["when"] == "optimizer=rmsprop"
    assert space("+optimizer.maximize=true,false")[1]["+optimizer.maximize"] == "true,false"
    assert space("optimizer.lr=0.1,0.2", "optimizer.lr=0.3") == space("optimizer.lr=0.3")


@pytest.mark.slow
def test_an_argument_that_no_file_shows_is_searched(boltlab):
    space = ("+optimizer.amsgrad=true,false", "optimizer=adam", "sampler=grid", "pruner=none")
    code, out, err = boltlab("sweep", *QUICK, *space, "trainer.max_epochs=1")
    assert code == 0, (out, err)
    for t in known():
        config = yaml.safe_load((folder() / str(t.number) / "config.yaml").read_text())
        assert config["optimizer"]["amsgrad"] == (t.params["+optimizer.amsgrad"] == "true")
    text = (folder() / "best.yaml").read_text()
    best = known()[int(re.search(r"trial (\d+)", text)[1])]
    assert best.value == max(t.value for t in known())
    assert yaml.safe_load(text)["optimizer"]["amsgrad"] == (best.params["+optimizer.amsgrad"] == "true")


@pytest.mark.slow
def test_workers_are_jobs_of_a_launcher(boltlab):
    launcher = ("launcher=joblib", "launcher.n_jobs=2", "workers=2", "sweep.timeout_minutes=10")
    code, out, err = boltlab("sweep", *QUICK, *LR, "sweep.trials=3", "trainer.max_epochs=1", *launcher)
    assert code == 0, (out, err)
    assert [t.state.name for t in known()] == ["COMPLETE"] * 3
    assert len({t.params["optimizer.lr"] for t in known()}) == 3
    assert [runs.read_summary(path)["status"] for path in (folder() / "workers").iterdir()] == ["finished"] * 2
    code, out, _ = boltlab("sweep", *QUICK, *LR, "sweep.trials=3", "trainer.max_epochs=1", *launcher)
    assert code == 0 and "nothing runs" in out and len(list((folder() / "workers").iterdir())) == 2
    cores = len(os.sched_getaffinity(0))
    threads = {json.loads((folder() / n / "environment.json").read_text())["threads"] for n in "012"}
    assert threads == {max(1, cores // 2)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "has nothing to try"),
        (("optimizer.lr=0.1,0.2", "init_from=latest"), "name the run"),
        (("optimizer.lr=0.1,0.2", "resume=latest"), "resume"),
        (("seed=1,2", "seeds=2"), "seed is a key of the space"),
        (("data.fold=0,1", "folds=3"), "the space names some"),
        (("optimizer.lr=0.1,0.2", "seed=abc"), "takes int"),
        (("optimizer.lr=0.1,0.2", "sweep.objectives={latency_ms: min}", "trainer.devices=2"), "trainer.devices=1"),
        (("optimizer.lr=0.1,0.2", "sweep.objectives={samples_per_second: max}", "callbacks=[best,last]"), "callback"),
        (("sweep=digitz",), "did you mean 'digits'"),
        (("optimizer.lr=interval(1,0)",), "low must be below high"),
        (("optimizer.ler=0.1,0.2",), "did you mean 'lr'"),
        (("optimizer=sgd,adamm",), "did you mean 'adam'"),
        (("optimizer.lr=0.1,fast",), "takes float"),
        (("sampler=grid", "optimizer.lr=interval(0.1,0.2)"), "has endless values"),
        (("optimizer.lr=0.1,0.2", "sweep.objectives={val_acc: max, parameters: min}"), "pruner=none"),
        (("optimizer.lr=0.1,0.2", "sweep.objectives={val_akk: max}"), "did you mean 'val_acc'"),
        (("optimizer.lr=0.1,0.2", "sweep.objectives={val_acc: up}"), "max"),
        (("optimizer.lr=0.1,0.2", "sweep.trails=3"), "did you mean 'trials'"),
        (("optimizer.lr=0.1,0.2", "workers=0"), "from 1"),
        (("optimizer.lr=0.1,0.2", "sampler.seeds=1"), "seed"),
    ],
)
def test_a_mistake_ends_a_sweep_before_it_begins(boltlab, arguments, named):
    code, _, err = boltlab("sweep", *arguments)
    assert code == 2 and named in err, err
    assert not Path("logs").exists()


def test_a_storage_that_cannot_be_opened_is_named_and_its_password_stands_nowhere(boltlab, monkeypatch):
    url = "mysql+nothing://me:sesame-9@127.0.0.1:1/x"
    code, _, err = boltlab("sweep", *QUICK, *LR, f'storage="{url}"')
    assert code == 2 and "oc.env" in err and "sesame-9" not in err
    monkeypatch.setenv("STUDY_URL", url)
    code, out, err = boltlab("sweep", *QUICK, *LR, "storage=${oc.env:STUDY_URL}")
    assert code == 1 and "storage=mysql+nothing://me:***@127.0.0.1:1/x cannot be opened" in err, err
    written = [path for path in Path("logs").rglob("*") if path.is_file() and b"sesame-9" in path.read_bytes()]
    assert "sesame-9" not in out + err and not written
