import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pausing import pause
from waiting import HANG, until

from boltlab import runs
from boltlab.config import trust

QUICK = ("logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=3")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")


def started(tmp_path, *command):
    home = {**os.environ, "HOME": str(tmp_path)}  # where Ray keeps a token
    return subprocess.Popen([sys.executable, "-m", "boltlab", *command], env=home, stdout=subprocess.PIPE)


def paused(process):
    """The files by which two runs say that they are there, once they do."""

    def found():
        return sorted(path for path in Path("logs/train").glob("*/?/paused") if path.read_text())

    until(lambda: len(found()) == 2, process)
    return found()


@pytest.mark.faults
def test_a_killed_run_costs_itself_alone_and_the_others_save_when_told_to_stop(tmp_path):
    pytest.importorskip("ray", reason="the extra boltlab[ray] is not installed")
    command = ("train", "-m", *QUICK, "seed=1,2", "launcher=ray", "launcher.num_cpus=0.5", *pause(tmp_path, 14))
    with started(tmp_path, *command) as process:
        first, _ = paused(process)
        os.kill(int(first.read_text()), signal.SIGKILL)
        sweep, killed = first.parents[1], first.parent
        until(lambda: runs.status(runs.read_summary(killed), killed) == "killed", process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG)
    assert process.returncode == 143
    assert [row["status"] for row in json.loads((sweep / "jobs.json").read_text())["jobs"]] == ["killed", "interrupted"]
    assert runs.read_summary(sweep / "1")["reason"] == "stopped by SIGTERM"
    assert (sweep / "1" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.faults
def test_workers_of_a_sweep_are_tasks_and_save_when_told_to_stop(tmp_path, boltlab, monkeypatch):
    pytest.importorskip("ray", reason="the extra boltlab[ray] is not installed")
    space = ("optimizer.lr=tag(log,interval(1e-3,1e-1))", "pruner=none", "sweep.trials=2", "workers=2")
    command = ("sweep", *QUICK, *space, *pause(tmp_path, 14))
    with started(tmp_path, *command, "launcher=ray", "launcher.num_cpus=0.5") as process:
        (top,) = {path.parents[1] for path in paused(process)}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG)
    assert process.returncode == 143
    for folder in (top / "0", top / "1", top / "workers" / "0", top / "workers" / "1"):
        assert runs.read_summary(folder)["reason"] == "stopped by SIGTERM", folder
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("boltlab.config.trust.PACKAGES", ("pausing_callback", *trust.PACKAGES))
    code, out, err = boltlab(*command)  # who starts the workers is no part of what the sweep is
    assert code == 0 and "resumes" in out and out.count(" finished: ") == 2, (out, err)
    assert [len(runs.read_summary(top / name)["resumed"]) for name in "01"] == [1, 1]


def test_without_ray_a_line_says_what_to_install(boltlab, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = boltlab("train", *QUICK, "launcher=ray")
    assert code == 1 and "pip install 'boltlab[ray]'" in err and not Path("logs").exists()
