"""Several processes of one run: resumed to the same bits; one that is killed, raises or hangs ends all."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.rows import TWO, plain
from waiting import HANG, until
from warm import differences, only_run, outcome

pytestmark = [pytest.mark.floats, pytest.mark.faults]

QUICK = ("train", "logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=4")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")
QUICK += ("trainer=ddp", "trainer.devices=2", "model.net.dropout=0.3")

# A callback of our own: the processes are started anew, so nothing can be put into them from outside.
FAULTY = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from lightning.pytorch import Callback
from boltlab.ground.errors import UserError

class Fault(Callback):
    def __init__(self, rank, step, kind):
        self.rank, self.step, self.kind = rank, step, kind
        if kind == "begin" and os.environ.get("RANK") == str(rank):
            Path(f"begins-{rank}").touch()
            time.sleep(3600)
        if kind == "begin":
            import torch.distributed

            join = torch.distributed.init_process_group

            def joins(*arguments, **keywords):
                Path("joins").touch()
                join(*arguments, **keywords)

            torch.distributed.init_process_group = joins

    def on_train_batch_end(self, trainer, *_):
        Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.03)  # they ask one another every half a second
        if trainer.global_step < self.step or os.environ.get("NO_FAULT"):
            return
        if self.rank != trainer.global_rank:
            return
        if os.environ.get("ONCE"):
            if Path("once").exists():
                return
            Path("once").touch()
        if self.kind == "raise":
            raise ValueError("what went wrong")
        if self.kind == "user":
            raise UserError("one file is no picture")
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "parent":
            os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
            time.sleep(3600)
        self.rank = None  # once
        os.kill(os.getpid(), getattr(signal, self.kind))
"""


@pytest.fixture(autouse=True)
def faulty(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY, encoding="utf-8")


def fault(rank, step, kind):
    return (
        "+callbacks.fault._target_=faulty.Fault",
        *(f"+callbacks.fault.{k}={v}" for k, v in {"rank": rank, "step": step, "kind": kind}.items()),
    )


def start(warm, tmp_path, name, *arguments, **environment):
    (tmp_path / name).mkdir(exist_ok=True)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    before = (
        f"sys.path.insert(0, {str(tmp_path)!r})\nfrom boltlab.config import trust as t\n"
        "t.PACKAGES = (*t.PACKAGES, 'faulty')"
    )
    return warm(*arguments, folder=tmp_path / name, before=before, PYTHONPATH=path, **environment)


def alive(folder):
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    assert len(pids) == 2
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def whole(warm_server, tmp_path_factory):
    """The outcome of a run that nothing happened to."""
    from warm import Child

    folder = tmp_path_factory.mktemp("whole")
    child = Child(warm_server, QUICK, folder, "", {}).wait()
    assert child.code == 0, child.stderr
    return outcome(only_run(folder / "logs"))


@pytest.mark.parametrize(
    ("rank", "step", "kind", "every"),
    [(0, 16, "SIGKILL", 3), (1, 12, "SIGKILL", None), (1, 25, "parent", 4), (0, 18, "SIGTERM", None)],
)
def test_two_processes_go_on_to_the_same_bits(warm, tmp_path, whole, rank, step, kind, every):
    """One of them killed in mid-epoch, the other after an epoch's end, their parent, and one told to stop."""
    more = (f"callbacks.last.every_n_train_steps={every}",) if every else ()
    child = start(warm, tmp_path, "a", *QUICK, *more, *fault(rank, step, kind)).wait()
    folder = only_run(tmp_path / "a" / "logs")
    until(lambda: not alive(tmp_path / "a"))
    assert child.code == {"SIGKILL": 1, "parent": -9, "SIGTERM": 143}[kind], child.stderr
    if kind == "SIGKILL":
        assert child.stderr.splitlines()[-1].startswith(f"boltlab train: rank {rank} was killed by SIGKILL")
        assert json.loads((folder / "summary.json").read_text())["reason"].startswith(f"rank {rank} was killed")
    child = start(warm, tmp_path, "a", "train", "resume=latest", NO_FAULT="1").wait()
    assert child.code == 0, child.stderr
    assert "resumes from last.ckpt" in child.stdout
    assert differences(whole, outcome(folder)) == []


def test_the_process_that_raises_is_named_last(warm, tmp_path):
    child = start(warm, tmp_path, "a", *QUICK, *fault(1, 5, "raise")).wait()
    assert child.code == 1 and alive(tmp_path / "a") == []
    assert child.stderr.splitlines()[-1] == "rank 1 failed: ValueError: what went wrong"
    assert 'raise ValueError("what went wrong")' in child.stderr
    summary = json.loads((only_run(tmp_path / "a" / "logs") / "summary.json").read_text())
    assert summary["reason"] == "rank 1 failed: ValueError: what went wrong"


def test_a_process_that_hangs_ends_all_after_the_timeout(warm, tmp_path):
    child = start(warm, tmp_path, "a", *QUICK, "timeout_seconds=15", *fault(1, 5, "hang")).wait()
    assert child.code == 1 and alive(tmp_path / "a") == []
    assert child.stderr.splitlines()[-1].startswith("boltlab train: rank 1 gave no answer any more; rank 0 saw: ")


@pytest.mark.parametrize("kind", ["raise", "SIGKILL"])
def test_max_restarts_goes_on_from_last_to_the_same_bits(warm, tmp_path, whole, kind):
    often = ("callbacks.last.every_n_train_steps=5", "max_restarts=1")
    child = start(warm, tmp_path, "a", *QUICK, *often, *fault(1, 12, kind), ONCE="1").wait()
    assert child.code == 0, child.stderr
    folder = only_run(tmp_path / "a" / "logs")
    reason = "failed: ValueError: what went wrong" if kind == "raise" else "was killed by SIGKILL"
    told = json.loads((folder / "summary.json").read_text())["restarts"]
    assert len(told) == 1 and told[0]["reason"].startswith(f"rank 1 {reason}")
    assert child.stderr.rstrip().endswith("restart 1 of 1")
    assert differences(whole, outcome(folder)) == []


def test_what_would_fail_again_is_not_restarted(warm, tmp_path):
    child = start(warm, tmp_path, "a", *QUICK, "max_restarts=3", *fault(1, 5, "user")).wait()
    assert child.code == 1
    assert child.stderr.strip() == "boltlab train: one file is no picture"


def test_a_script_that_calls_us_is_not_run_again_by_each_process(warm, tmp_path):
    """As a notebook and a script without `if __name__ == "__main__"` do it."""
    (tmp_path / "script.py").write_text("open('ran-again', 'w')")
    before = f"import __main__\n__main__.__file__ = {str(tmp_path / 'script.py')!r}"
    child = warm(*QUICK, "trainer.max_epochs=1", before=before).wait()
    assert child.code == 0, child.stderr
    assert not (tmp_path / "ran-again").exists()


def test_each_job_of_a_sweep_gets_its_processes_its_folder_and_one_wandb_run(warm, tmp_path):
    one = ("trainer.max_epochs=1", "logger=wandb", "test=false", "seed=0,1", "-m")
    child = warm(*QUICK, *one, WANDB_MODE="offline").wait()
    assert child.code == 0, child.stderr
    (sweep,) = (tmp_path / "logs" / "train").iterdir()
    for job in "01":
        assert json.loads((sweep / job / "summary.json").read_text())["status"] == "finished"
        assert len(list((sweep / job).glob("**/*.wandb"))) == 1
    assert len(list(tmp_path.glob("**/*.wandb"))) == 2


@pytest.mark.parametrize("kind", ["shipped", "plain"])
def test_two_agents_restart_a_killed_process_and_go_on_to_the_same_bits(warm, tmp_path, whole, kind):
    """Two of torchrun's agents are two nodes; the processes that they start again find their run."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", f"--rdzv-id={tmp_path.name}"]
    agent += ["--monitor-interval=0.1", "-m", "boltlab"]
    folders = [str(tmp_path), str(Path(__file__).parents[1] / "training"), os.environ.get("PYTHONPATH", "")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "WANDB_SERVICE"))}
    kept |= {"PYTHONPATH": ":".join(folders)}
    given = QUICK
    if kind == "plain":  # its DataLoader is shared, seeded and resumed by the engine
        given = (*plain("modules.VAE"), *TWO, "trusted=[zoo]")
        command = [sys.executable, "-m", "boltlab", *given]
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        whole = outcome(only_run(tmp_path / "logs"))
        shutil.rmtree(tmp_path / "logs")
    command = [*agent, *(text for text in given if not text.startswith("trainer.devices"))]
    command += ["callbacks.last.every_n_train_steps=5", *fault(1, 12, "SIGKILL")]
    with (tmp_path / "agent-0").open("wb") as one, (tmp_path / "agent-1").open("wb") as other:
        kept["ONCE"] = "1"
        agents = [subprocess.Popen(command, cwd=tmp_path, env=kept, stdout=out, stderr=out) for out in (one, other)]
        try:
            codes = [agent.wait(HANG) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    texts = [(tmp_path / name).read_text() for name in ("agent-0", "agent-1")]
    assert codes == [0, 0], texts
    said = r"resumes from last\.ckpt, step \d+, \d epochs? done"
    assert sum(bool(re.search(said, text)) for text in texts) == 1, texts
    assert differences(whole, outcome(only_run(tmp_path / "logs"))) == []


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


STARTING = """
import torch.distributed.launcher.api as api
original = api.elastic_launch
def early(*arguments):
    os.kill(os.getpid(), 15)
    return original(*arguments)
api.elastic_launch = early
"""


def test_a_stop_before_the_processes_are_there_is_not_lost(warm, tmp_path):
    child = warm(*QUICK, "max_restarts=2", before=STARTING).wait()
    assert child.code == 143 and "restart" not in child.stderr, child.stderr
    summary = json.loads((only_run(tmp_path / "logs") / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", "stopped by SIGTERM")
    assert "restarts" not in summary and not list(tmp_path.glob("logs/train/*/checkpoints/*"))


@pytest.mark.parametrize("at", ["begins-1", "joins"])
def test_a_stop_while_the_processes_begin_is_a_stop(warm, tmp_path, at):
    never = ("max_restarts=2", "timeout_seconds=100000")  # what only torch would end
    child = start(warm, tmp_path, "a", *QUICK, *never, *fault(1, 0, "begin"))
    for file in ("begins-1", at):
        child.wait_for(tmp_path / "a" / file)
    time.sleep(at == "joins")  # where it hears no signal: in torch, which waits for the other process
    child.send(signal.SIGTERM)
    assert child.wait().code == 143 and "restart" not in child.stderr, child.stderr
    summary = json.loads((only_run(tmp_path / "a" / "logs") / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", "stopped by SIGTERM")


def test_ctrl_c_reaches_every_process_once(warm, tmp_path):
    # The processes belong to the terminal as well only if what they are forked from does.
    child = start(warm, tmp_path, "a", *QUICK, "trainer.max_epochs=2000", OWN_FORKSERVER="1")
    child.wait_for(tmp_path / "a" / "logs" / "train", pattern="*/checkpoints/last.ckpt")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does it: to the command and to its processes
    assert child.wait().code == 130, child.stderr
    assert child.stderr.strip().endswith("boltlab train: stopped by SIGINT")
    assert json.loads((only_run(tmp_path / "a" / "logs") / "summary.json").read_text())["status"] == "interrupted"


def test_a_sharded_run_goes_on_to_the_same_bits(warm, tmp_path):
    sharded = (*QUICK, "trainer=fsdp", "trainer.devices=2", "trainer.max_epochs=4")
    folders = {}
    for name, more in {"whole": (), "stopped": fault(1, 15, "SIGTERM")}.items():
        child = start(warm, tmp_path, name, *sharded, *more).wait()
        assert child.code == (143 if more else 0), child.stderr
        folders[name] = only_run(tmp_path / name / "logs")
    child = start(warm, tmp_path, "stopped", "train", "resume=latest", NO_FAULT="1").wait()
    assert child.code == 0, child.stderr
    # In mid-epoch; in which one depends on how fast the machine comes to the step that the processes agree on.
    assert re.search(r"resumes from last\.ckpt, step \d+, \d epochs done, after batch \d+ of epoch \d", child.stdout)
    assert differences(outcome(folders["whole"]), outcome(folders["stopped"])) == []
