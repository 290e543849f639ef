"""Real jobs of a real Slurm: an array to its end, whatever interrupts its runs; refusals; what the tables say."""

import json
import sys
from pathlib import Path

import pytest
from pausing import pause
from warm import differences, outcome

from boltlab import runs

pytestmark = pytest.mark.slurm
SCRIPTS = Path(__file__).parents[2] / "scripts"

QUICK = ("logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=3")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")
SLURM = ("launcher=slurm", "launcher.timeout_min=50", "launcher.poll_seconds=0.2")


def sweep():
    (folder,) = (path.parent for path in Path("logs/train").glob("*/jobs.json"))
    return folder


def rows(*keys):
    found = json.loads((sweep() / "jobs.json").read_text())["jobs"]
    return [tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]] for row in found]


def job(folder):
    return json.loads((folder / "job.json").read_text())["slurm"]


def test_preempted_requeued_and_warned_jobs_of_an_array_end_with_the_same_bits(cluster, boltlab, tmp_path):
    command = ("train", "-m", *QUICK, "seed=1,2,3", *SLURM, *pause(tmp_path, 14))
    code, out, err = boltlab(*command, "launcher.wait=false")
    assert code == 0, err
    folders = [sweep() / name for name in "012"]
    ids = [job(folder) for folder in folders]
    assert len({number.partition("_")[0] for number in ids}) == 1 and f"Slurm job {ids[0].partition('_')[0]}" in out
    cluster.wait_for("all runs at their step", lambda: all((f / "paused").exists() for f in folders))
    assert boltlab("runs")[1].count("running") == 3
    cluster.run("scontrol", "requeue", ids[0])
    cluster.run("scancel", "--signal=USR1", ids[1])  # what Slurm sends before the time limit

    def states():
        return [cluster.run("squeue", "-h", "-r", "-o", "%T", "-j", number) for number in ids]

    cluster.wait_for("two that wait", lambda: states()[:2] == ["PENDING"] * 2)
    cluster.run("sbatch", "-p", "high", "-n", str(cluster.cpus), "-o", "/dev/null", "--wrap", "sleep 3600")
    cluster.wait_for("one that was preempted", lambda: states() == ["PENDING"] * 3)
    assert boltlab("runs")[1].count("preempted") == 3
    reasons = [runs.read_summary(folder)["reason"] for folder in folders]
    assert reasons == ["stopped by SIGTERM", "stopped by SIGUSR1", "stopped by SIGTERM"]

    cluster.run("scancel", "--partition=high")
    for number in ids:  # Slurm would wait for two minutes
        cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now+2")  # not in the same second: refused
    code, out, err = boltlab(*command)  # watches them, and submits none
    assert code == 0, (out, err)
    assert rows("status") == ["finished"] * 3 and [job(folder) for folder in folders] == ids
    assert boltlab("train", "-m", *QUICK, "seed=1,2,3", "log_dir=whole")[0] == 0
    for folder, whole in zip(folders, sorted(Path("whole/train").glob("*/[012]")), strict=True):
        assert len(runs.read_summary(folder)["resumed"]) == 1
        assert differences(outcome(folder), outcome(whole)) == []


def test_what_sbatch_refuses_is_said_at_once_and_the_same_command_goes_on(cluster, boltlab):
    code, _, err = boltlab("train", *QUICK, *SLURM, "launcher.partition=nope")
    assert code == 1 and "invalid partition specified: nope" in err and "launcher.partition=" in err
    assert not list(runs.folders("logs"))
    command = ("train", "-m", *QUICK, "seed=1,2", *SLURM)
    code, out, err = boltlab(*command, "launcher.partition=nope")
    assert code == 1 and "invalid partition specified: nope" in err and out.count("not started") == 2
    assert rows("status") == ["not started"] * 2
    first = sweep()
    held = "+launcher.additional_parameters.hold=true"
    code, out, _ = boltlab(*command, held, "launcher.wait=false")
    assert code == 0 and sweep() == first and out.count("queued") == 2
    out = boltlab("runs")[1]
    assert out.count("queued") == 2
    ids = [job(first / name) for name in "01"]
    assert boltlab(*command, held, "launcher.wait=false")[0] == 0  # the second time, they are in the queue
    assert [job(first / name) for name in "01"] == ids
    cluster.run("scancel", *ids)
    cluster.wait_for("they are gone", lambda: boltlab("runs")[1].count("not started") == 2)
    code, out, _ = boltlab(*command, held, "launcher.wait=false")  # new jobs, in the same folders
    assert code == 0 and rows("status", "folder") == [("queued", "0"), ("queued", "1")]
    assert not {job(first / name) for name in "01"} & set(ids)


def test_a_job_that_dies_before_it_begins_says_why(cluster, boltlab):
    setup = "launcher.setup=['echo no such module: cuda >&2; exit 3']"
    code, _, _ = boltlab("train", "-m", *QUICK, "seed=1,2", *SLURM, setup)
    assert code == 1 and rows("status", "reason") == [("failed", "no such module: cuda")] * 2
    assert boltlab("runs")[1].count("failed") == 2


def test_resources_are_the_same_for_all_jobs_and_known_beforehand(cluster, boltlab):
    code, _, err = boltlab("train", "-m", *QUICK, *SLURM, "trainer=ddp", "trainer.devices=1,2")
    assert code == 2 and "launcher.tasks_per_node" in err and "the same in all jobs" in err
    code, _, err = boltlab("train", *QUICK, *SLURM, "trainer=ddp")
    assert code == 2 and "launcher.tasks_per_node=auto" in err and "trainer.devices=4" in err
    assert not Path("logs").exists()


def test_each_task_of_a_job_is_a_rank(cluster, boltlab):
    code, out, err = boltlab("train", *QUICK, *SLURM, "trainer=ddp", "trainer.devices=2")
    folder = next(runs.folders("logs"))
    said = (folder / "output.txt").read_text()
    assert code == 0 and "finished" in out, (out, err, said)
    config, summary = runs.load_config(folder), runs.read_summary(folder)
    assert (config.trainer.devices, config.trainer.num_nodes) == (2, 1)
    assert summary["epochs"] == 3 and summary["test"]["test_acc"] > 0.5 and len(list(runs.folders("logs"))) == 1
    logs = sorted(path.name for path in (folder / "slurm").glob("*_log.out"))
    assert logs == [f"{job(folder)}_{rank}_log.out" for rank in range(2)]


def test_the_job_file_is_queued_again_at_its_time_limit_and_goes_on(cluster, tmp_path):
    """scripts/slurm.sbatch as it is, with three tasks of one machine."""
    program = tmp_path / ".venv" / "bin" / "boltlab"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m boltlab "$@"\n')
    program.chmod(0o755)
    options = ("--nodes=1", "--ntasks-per-node=3", "--gpus-per-node=0", "--cpus-per-task=1", "--output=out")
    command = (*QUICK, "data.batch_size=129", *pause(tmp_path, 14))
    number = cluster.run("sbatch", "--parsable", *options, "--time=50", str(SCRIPTS / "slurm.sbatch"), *command)
    cluster.wait_for("a run at its step", lambda: list(Path("logs/train").glob("*/paused")))
    cluster.run("scancel", "--signal=USR1", number)  # what Slurm sends before the time limit
    cluster.wait_for("one that waits", lambda: cluster.run("squeue", "-h", "-o", "%T", "-j", number) == "PENDING")
    cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now+2")  # not in the same second: refused
    (folder,) = runs.folders("logs")
    cluster.wait_for("its end", lambda: runs.read_summary(folder)["status"] == "finished")
    said = Path("out").read_text()
    assert "resumes from last.ckpt, step " in said and "stopped by SIGUSR1" in said, said
    assert len(runs.read_summary(folder)["resumed"]) == 1 and len(list(runs.folders("logs"))) == 1


def test_workers_of_a_sweep_are_jobs_and_those_that_are_stopped_go_on_with_their_trials(cluster, boltlab, tmp_path):
    from boltlab.sweeps.study import open_storage

    space = ("optimizer.lr=tag(log,interval(1e-3,1e-1))", "pruner=none", "sweep.trials=3", "workers=2")
    command = ("sweep", *QUICK, *space, *SLURM, "launcher.partition=low", *pause(tmp_path, 14))
    code, out, err = boltlab(*command, "launcher.wait=false")
    assert code == 0 and "2 in all" in out, (out, err)
    (top,) = (path.parent for path in Path("logs/train").glob("*/sweep.json"))
    cluster.wait_for("both workers in a trial", lambda: all((top / n / "paused").exists() for n in "01"))
    ids = [job(top / "workers" / name) for name in "01"]

    def waiting():
        return [cluster.run("squeue", "-h", "-r", "-o", "%T", "-j", number) == "PENDING" for number in ids]

    cluster.run("scontrol", "requeue", ids[0])
    cluster.run("scancel", "--signal=USR1", ids[1])  # what Slurm sends before the time limit
    cluster.wait_for("two that wait", lambda: all(waiting()))
    assert [runs.read_summary(top / n)["status"] for n in "01"] == ["interrupted"] * 2
    Path("go").touch()  # the third is not to wait
    for number in ids:
        cluster.run("scontrol", "update", f"jobid={number}", "StartTime=now+2")
    code, out, err = boltlab(*command)  # watches them, and submits none
    said = "".join((top / "workers" / name / "output.txt").read_text() for name in "01")
    assert code == 0 and "3 of 3" in said and "requeue failed" not in said, (out, err, said)
    storage = open_storage(None, top)
    trials = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert len({t.params["optimizer.lr"] for t in trials}) == 3
    assert [len(runs.read_summary(top / n)["resumed"]) for n in "01"] == [1, 1]
    assert (top / "best.yaml").exists() and (top / "report.html").exists()
