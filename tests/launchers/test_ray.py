import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pausing import pause

from boltlab import runs

QUICK = ("logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=3")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")


@pytest.mark.faults
def test_a_killed_run_costs_itself_alone_and_the_others_save_when_told_to_stop(tmp_path):
    pytest.importorskip("ray", reason="the extra boltlab[ray] is not installed")
    command = ("train", "-m", *QUICK, "seed=1,2", "launcher=ray", "launcher.num_cpus=0.5", *pause(tmp_path, 14))
    home = {**os.environ, "HOME": str(tmp_path)}  # where Ray keeps a token
    with subprocess.Popen([sys.executable, "-m", "boltlab", *command], env=home, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 300  # Ray alone takes a minute to start where the machine is busy
        while len(paused := sorted(Path("logs/train").glob("*/?/paused"))) < 2 or not all(
            p.read_text() for p in paused
        ):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        paused = sorted(Path("logs/train").glob("*/?/paused"))
        os.kill(int(paused[0].read_text()), signal.SIGKILL)
        sweep, killed = paused[0].parents[1], paused[0].parent
        while runs.status(runs.read_summary(killed), killed) != "killed":
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 143
    assert [row["status"] for row in json.loads((sweep / "jobs.json").read_text())["jobs"]] == ["killed", "interrupted"]
    assert runs.read_summary(sweep / "1")["reason"] == "stopped by SIGTERM"
    assert (sweep / "1" / "checkpoints" / "last.ckpt").is_file()


def test_without_ray_a_line_says_what_to_install(boltlab, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = boltlab("train", *QUICK, "launcher=ray")
    assert code == 1 and "pip install 'boltlab[ray]'" in err and not Path("logs").exists()
