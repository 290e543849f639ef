import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG, until

from boltlab import runs

QUICK = ("model=linear", "trainer.max_epochs=1", "logger=csv", "data.batch_size=256", "trainer.accelerator=cpu")
QUICK += ("callbacks=[best,last]", "test=false", "optimizer=sgd")


class Stop(BaseException):
    """What a signal raises."""


@pytest.fixture
def ends(monkeypatch):
    """Says how the jobs end, by seed, without training: an exception to raise, or nothing."""
    endings = {}

    def fit(folder_name, config):
        folder, seed = Path(folder_name), config.seed
        if seed in endings:
            raise endings[seed]
        runs.end(folder, status="finished", best={"val_acc": seed / 10})

    monkeypatch.setattr("boltlab.training.fit.fit", fit)
    return endings


def sweeps():
    return sorted(Path("logs/train").iterdir(), key=lambda folder: folder.stat().st_ctime_ns)


def jobs(sweep, *keys):
    rows = json.loads((sweep / "jobs.json").read_text())["jobs"]
    return [tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]] for row in rows]


def test_jobs_that_fail_leave_the_others_running_and_a_table_says_it(boltlab):
    fixed = (*QUICK, "callbacks=[best,last,nan_guard]", "scheduler=constant")
    code, out, _ = boltlab("train", "-m", *fixed, "optimizer.lr=0.1,1e30", "seed=1,2")
    assert code == 1
    (sweep,) = sweeps()
    assert jobs(sweep, "job", "status", "folder") == [
        (0, "finished", "0"), (1, "finished", "1"), (2, "failed", "2"), (3, "failed", "3")
    ]  # fmt: skip
    best, reasons = jobs(sweep, "best"), jobs(sweep, "reason")
    assert best[0] == runs.read_summary(sweep / "0")["best"]["val_acc"] > 0.3 and best[2:] == [None, None]
    assert reasons[:2] == ["", ""] and all("loss is nan" in reason for reason in reasons[2:])
    configs = [runs.load_config(sweep / str(number)) for number in range(4)]
    assert [(c.optimizer.lr, c.seed) for c in configs] == [(0.1, 1), (0.1, 2), (1e30, 1), (1e30, 2)]
    assert jobs(sweep, "overrides")[2] == [*fixed, "optimizer.lr=1e+30", "seed=1"]
    rows = out[out.rindex(" job ") :].splitlines()[1:5]
    for row, status in zip(rows, ("finished", "finished", "failed", "failed"), strict=True):
        assert status in row and "seed=" in row and "model=linear" not in row
    assert f"{best[0]:.4f}" in rows[0] and "loss is nan" in rows[2] and f"sweep folder  {sweep}" in out


def test_the_same_command_runs_only_what_is_missing(boltlab, ends):
    command = ("train", "-m", *QUICK, "seed=1,2,3,4")
    ends.update({2: RuntimeError("no luck"), 4: OSError("disk full")})
    assert boltlab(*command)[0] == 1
    (sweep,) = sweeps()
    assert jobs(sweep, "status") == ["finished", "failed", "finished", "failed"]
    assert jobs(sweep, "reason")[1] == "RuntimeError: no luck"
    kept = {path: path.read_bytes() for path in sweep.glob("*/*") if path.is_file()}
    del ends[2]
    code, out, _ = boltlab(*command)
    assert code == 1 and sweeps() == [sweep]
    assert jobs(sweep, "status", "folder") == [
        ("finished before", "0"), ("finished", "1-2"), ("finished before", "2"), ("failed", "3-2")
    ]  # fmt: skip
    assert "2 of 4 jobs are finished" in out and out.count("finished before") == 4
    ends.clear()
    assert boltlab(*command)[0] == 0
    assert jobs(sweep, "status", "folder")[1::2] == [("finished before", "1-2"), ("finished", "3-3")]
    assert jobs(sweep, "best") == [0.1, 0.2, 0.3, 0.4] and jobs(sweep, "reason") == [""] * 4
    assert {path: path.read_bytes() for path in kept} == kept


GROUPS = tuple(text for text in QUICK if not text.startswith(("model=", "callbacks=")))


@pytest.mark.parametrize(
    "grid",
    [
        (*QUICK, "seed=1,2"),
        (*QUICK, "seed=1"),
        (*QUICK, "seed=1,2", "launcher=joblib"),
        (*GROUPS, "model=linear,mlp", "callbacks=none"),
        ("experiment=digits_quickstart,dense_64", "logger=csv"),
    ],
    ids=["two", "one", "launcher", "groups", "experiments"],
)
@pytest.mark.parametrize("started_again", [False, True], ids=["given again", "by Slurm"])
def test_a_sweep_that_is_finished_is_shown_and_nothing_runs(boltlab, ends, monkeypatch, grid, started_again):
    alone = [text for text in grid if not text.startswith("launcher=")]
    assert boltlab("train", "-m", *alone)[0] == 0
    (first,) = sweeps()
    count = len(jobs(first, "status"))
    kept = {path: path.read_bytes() for path in first.glob("**/*") if path.is_file()}
    monkeypatch.setattr("boltlab.processes.launchers.process.Job", None)
    if started_again:
        monkeypatch.setattr("boltlab.ground.started_by.start", lambda: ("slurm 17", 1))
    code, out, _ = boltlab("train", "-m", *grid)
    assert code == 0 and sweeps() == [first]
    assert f"all jobs of this command are finished ({count}), nothing runs" in out
    assert out.count("finished before") == count and f"sweep folder  {first}" in out
    assert {path: path.read_bytes() for path in first.glob("**/*") if path.is_file()} == kept


def test_another_name_repeats_a_sweep_that_is_finished(boltlab, ends):
    command = ("train", "-m", *QUICK, "seed=1,2")
    assert boltlab(*command)[0] == 0
    assert "another name=… begins a new sweep" in boltlab(*command)[1]
    assert boltlab(*command, "name=again")[0] == 0
    assert [jobs(sweep, "status") for sweep in sweeps()] == [["finished", "finished"]] * 2
    assert "finished before" in boltlab(*command, "name=again")[1] and len(sweeps()) == 2


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_job_whose_folder_was_removed_runs_again_and_only_it(boltlab, ends, by_hand):
    assert boltlab("train", "-m", *QUICK, "seed=1,2,3")[0] == 0
    (sweep,) = sweeps()
    if by_hand:
        shutil.rmtree(sweep / "1")
    else:
        assert boltlab("runs", "rm", f"{sweep.name}/1", "yes=true")[0] == 0
    kept = {path: path.read_bytes() for number in "02" for path in (sweep / number).glob("**/*") if path.is_file()}
    code, out, _ = boltlab("train", "-m", *QUICK, "seed=1,2,3")
    assert code == 0 and sweeps() == [sweep] and "2 of 3 jobs are finished" in out
    assert jobs(sweep, "status", "folder") == [("finished before", "0"), ("finished", "1"), ("finished before", "2")]
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize(
    "other", [("seed=2,1",), ("seed=1,2", "optimizer.lr=0.3"), ("seed=1,2,3",), ("seed=1,2", "name=other")]
)
def test_another_command_is_another_sweep(boltlab, ends, other):
    ends[2] = RuntimeError("no luck")
    for grid in (("seed=1,2",), other):
        assert boltlab("train", "-m", *QUICK, *grid)[0] == 1
    assert len(sweeps()) == 2 and all("finished before" not in jobs(sweep, "status") for sweep in sweeps())


@pytest.mark.parametrize("code", [1, 0], ids=["one failed", "finished"])
def test_another_default_in_a_file_is_another_sweep(boltlab, ends, configs, code):
    if code:
        ends[2] = RuntimeError("no luck")
    assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == code
    path = configs / "optimizer" / "sgd.yaml"
    path.write_text(path.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == code
    assert [runs.load_config(sweep / "0").optimizer.momentum for sweep in sweeps()] == [0.9, 0.8]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stop()])
def test_a_signal_stops_the_sweep_and_the_same_command_goes_on(boltlab, ends, capsys, stop):
    command = ("train", "-m", *QUICK, "seed=1,2,3")
    ends[2] = stop
    if isinstance(stop, Stop):
        with pytest.raises(Stop):
            boltlab(*command)
        out = capsys.readouterr().out
    else:
        code, out, _ = boltlab(*command)
        assert code == 130
    (sweep,) = sweeps()
    assert jobs(sweep, "status")[::2] == ["finished", "not started"] and jobs(sweep, "folder")[2] is None
    assert jobs(sweep, "status")[1] == ("failed" if isinstance(stop, Stop) else "interrupted")
    assert "not started" in out and not (sweep / "2").exists()
    ends.clear()
    assert boltlab(*command)[0] == 0
    assert sweeps() == [sweep] and jobs(sweep, "status") == ["finished before", "finished", "finished"]


def test_two_processes_never_work_on_one_sweep(boltlab, ends):
    ends[2] = RuntimeError("no luck")
    assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == 1
    (sweep,) = sweeps()
    before = (sweep / "jobs.json").read_bytes()
    with runs.lock(sweep):
        code, _, err = boltlab("train", "-m", *QUICK, "seed=1,2")
    assert code == 1 and f"process {os.getpid()}" in err and sweep.name in err
    assert sweeps() == [sweep] and (sweep / "jobs.json").read_bytes() == before and not (sweep / "1-2").exists()


def test_a_job_at_which_another_process_works_is_left_to_it(boltlab, ends):
    ends[2] = RuntimeError("no luck")
    assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == 1
    (sweep,) = sweeps()
    ends.clear()
    runs.write_summary(sweep / "1", status="running")
    with runs.lock(sweep / "1"):
        assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == 1
    assert jobs(sweep, "status", "folder") == [("finished before", "0"), ("running", "1")]


def test_a_broken_table_of_another_sweep_is_no_crash(boltlab, ends):
    for text in ("", "[]", '{"jobs": 3}', '{"jobs": [{}]}'):
        folder = runs.new_folder("logs", "train", "sweep_x")
        (folder / "jobs.json").write_text(text)
    assert boltlab("train", "-m", *QUICK, "seed=1,2")[0] == 0


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_same_command(tmp_path):
    command = [sys.executable, "-m", "boltlab", "train", "-m", *QUICK, "trainer.max_epochs=1,40"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: list(Path("logs").glob("train/*/1/metrics.csv")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (sweep,) = sweeps()
    assert runs.status(runs.read_summary(sweep / "1"), sweep / "1") == "killed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    assert sweeps() == [sweep] and jobs(sweep, "status") == ["finished before", "finished"]


@pytest.mark.parametrize(
    ("where", "signum", "lost"),
    [
        ("boltlab.config.compose.groups", signal.SIGTERM, "another error"),
        ("boltlab.training.start.settle_weights", signal.SIGHUP, "nothing"),
        ("boltlab.runs.record.parse_config", signal.SIGTERM, "another error"),
        ("boltlab.runs.record.parse_config", signal.SIGINT, "nothing"),
        ("boltlab.runs.record.write_config", signal.SIGTERM, "not lost"),
    ],
)
def test_a_stop_while_a_config_is_composed_or_read_is_never_lost(boltlab, ends, monkeypatch, where, signum, lost):
    """Whatever the code that a signal finds makes of it: the exit code is the signal's, and the job goes on later."""
    module, _, name = where.rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), []

    def found(*arguments, **keywords):
        calls.append(name)
        if len(calls) == 1:
            try:
                os.kill(os.getpid(), signum)
            except BaseException:
                if lost == "not lost":
                    raise
                if lost == "another error":
                    raise SystemError("returned a result with an exception set") from None
        return original(*arguments, **keywords)

    monkeypatch.setattr(where, found)
    command = ("train", "-m", *QUICK, "seed=1,2")
    assert boltlab(*command)[0] == 128 + signum
    assert "finished" not in [status for sweep in grids() for status in jobs(sweep, "status")]
    assert boltlab(*command)[0] == 0 and len(grids()) == 1
    assert jobs(grids()[0], "status", "folder") == [("finished", "0"), ("finished", "1")]


def grids():
    return sweeps() if Path("logs/train").exists() else []
