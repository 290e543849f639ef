import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from pausing import pause
from warm import differences, outcome

from boltlab import runs
from boltlab.config import trust
from boltlab.ground.errors import UserError
from boltlab.processes import submit as launched
from boltlab.processes.launchers import process
from boltlab.processes.launchers.joblib import Joblib

pytestmark = pytest.mark.floats

QUICK = ("logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=3")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")
JOBLIB = ("launcher=joblib", "launcher.n_jobs=2", f"launcher.threads_per_job={torch.get_num_threads()}")


@pytest.mark.faults
def test_a_killed_job_costs_itself_alone_and_all_go_on_to_the_same_bits(warm, boltlab, tmp_path, monkeypatch):
    command = ("train", "-m", *QUICK, "seed=1,2,3", *pause(tmp_path, 14))
    first = warm(*command, *JOBLIB, before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    first.wait_for(tmp_path, "logs/train/*/0/paused")
    first.wait_for(tmp_path, "logs/train/*/1/paused")
    (sweep,) = Path("logs/train").iterdir()
    os.kill(int((sweep / "0" / "paused").read_text()), signal.SIGKILL)
    first.wait_for(tmp_path, "logs/train/*/2/paused")
    os.killpg(first.pid, signal.SIGTERM)  # all of them, as a terminal and a cluster do
    assert first.wait().code == 143, first.stderr
    statuses = [row["status"] for row in json.loads((sweep / "jobs.json").read_text())["jobs"]]
    assert statuses == ["killed", "interrupted", "interrupted"]
    assert [runs.read_summary(sweep / name).get("reason") for name in "12"] == ["stopped by SIGTERM"] * 2
    assert "stopped by SIGTERM" in (sweep / "1" / process.OUTPUT).read_text()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("boltlab.config.trust.PACKAGES", ("pausing_callback", *trust.PACKAGES))
    code, out, err = boltlab(*command)  # who starts the jobs is no part of what they are
    assert code == 0 and "resumes: 0 of 3 jobs are finished" in out, (out, err)
    assert boltlab("train", "-m", *QUICK, "seed=1,2,3", "log_dir=whole")[0] == 0
    for name, whole in zip("012", sorted(Path("whole/train").glob("*/[012]")), strict=True):
        assert differences(outcome(sweep / name), outcome(whole)) == []


class Fake:
    """A job that ends at once; `started` has what each was given."""

    started: list

    def __init__(self, entry, folder, variables, threads):
        self.started.append((folder.name, variables, threads))
        (folder / "summary.json").write_text('{"status": "finished"}')

    def send(self, signum):
        pass

    def wait(self):
        return 0


@pytest.mark.parametrize(
    ("visible", "settings", "expected"),
    [
        ("", {"n_jobs": 3, "threads_per_job": 2}, {None}),
        ("-1", {"n_jobs": 2}, {None}),
        ("0,1", {"n_jobs": 2, "accelerator": "cpu"}, {None}),
        ("0,1", {}, {"0", "1"}),
        ("0,1", {"gpus_per_job": "auto"}, {"0,1"}),
        ("4,5,6,7", {"gpus_per_job": [0, 1, 2]}, {"4,5,6"}),
        ("4,5,6,7", {"gpus_per_job": 2}, {"4,5", "6,7"}),
        ("GPU-a", {"n_jobs": 2}, {"GPU-a"}),
    ],
)
def test_each_job_sees_gpus_of_its_own(visible, settings, expected, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = [name for name in visible.split(",") if name not in ("", "-1")]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(seen))
    monkeypatch.setattr(process, "Job", Fake)
    monkeypatch.setattr(Fake, "started", [], raising=False)
    folders = [tmp_path / str(i) for i in range(8)]
    for folder in folders:
        folder.mkdir()
    Joblib(**settings).run(tmp_path, folders, [], "")
    assert sorted(name for name, _, _ in Fake.started) == [str(i) for i in range(8)]
    assert {variables.get("CUDA_VISIBLE_DEVICES") for _, variables, _ in Fake.started} == expected
    threads = {(variables["OMP_NUM_THREADS"], str(threads)) for _, variables, threads in Fake.started}
    (given,) = {pair[0] for pair in threads if pair[0] == pair[1]}
    at_a_time = settings.get("n_jobs", len(expected))
    assert int(given) == settings.get("threads_per_job", max(1, len(os.sched_getaffinity(0)) // at_a_time))


def test_a_cluster_that_is_not_there_is_one_line(boltlab, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = boltlab("train", "-m", *QUICK, "seed=1,2", "launcher=slurm")
    assert code == 1 and "there is no sbatch" in err and "launcher=joblib" in err and not Path("logs").exists()


def test_a_mistyped_launcher_is_named(boltlab):
    code, _, err = boltlab("train", *QUICK, "launcher=slum", "launcher.partition=gpu")
    assert code == 2 and "did you mean 'slurm'" in err
    code, _, err = boltlab("train", *QUICK, "launcher=slurm", "launcher.partitin=gpu")
    assert code == 2 and "did you mean 'partition'" in err
    code, _, err = boltlab("train", "-m", *QUICK, "launcher=slurm,joblib")
    assert code == 2 and "launcher" in err and "the same in all jobs" in err


def test_a_job_that_squeue_does_not_know_is_gone_if_it_is_ours(tmp_path, monkeypatch):
    from boltlab.processes.launchers import slurm

    (tmp_path / "job.json").write_text('{"slurm": "7_0", "name": "a"}')
    nothing = subprocess.CompletedProcess([], 0, stdout="", stderr="")
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: nothing)
    assert runs.job_states([tmp_path, tmp_path / "other"]) == {tmp_path: "gone"}
    monkeypatch.setattr(slurm.os, "getuid", lambda: tmp_path.stat().st_uid + 1)  # Slurm may hide what others do
    assert slurm.Slurm.states([tmp_path]) == {tmp_path: "unknown"}


def test_more_gpus_for_a_run_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="gpus_per_job=2, but there are 1 GPUs here"):
        Joblib(gpus_per_job=2)


def test_what_was_queued_by_another_machine_and_given_to_nobody_is_not_started(tmp_path):
    runs.write_summary(tmp_path, status="queued", host="another", pid=1)
    assert runs.status(runs.read_summary(tmp_path), tmp_path) == "queued"  # as everybody sees it
    assert launched.statuses([tmp_path, None]) == ["not started"] * 2  # as the command that is to start it does


def test_behind_torchrun_no_launcher_is_asked(boltlab, monkeypatch):
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boltlab.processes.rendezvous.run", lambda world, command: command())
    code, _, err = boltlab("train", *QUICK, *JOBLIB)
    assert code == 2 and "is asked by one process; torchrun has started 2" in err and not Path("logs").exists()
