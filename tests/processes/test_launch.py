"""How the end of several processes is read, and what they are forked from."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from waiting import HANG

from boltlab.config.compose import compose
from boltlab.ground.errors import UserError
from boltlab.processes import ends, rendezvous

LOST = {"partner": True, "user": False, "time": 1.0, "traceback": "", "message": "RuntimeError: gone"}


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error [::1]: Connection reset by peer"), True),
        (RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), True),
        (RuntimeError("NCCL error: ncclRemoteError: a remote process exited"), True),
        (RuntimeError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # of a logger, a download
        (FileNotFoundError("/data/igloo/transport/x.png"), False),
        (UserError("/data/gloo/transport/x.png cannot be read"), False),
    ],
)
def test_only_what_says_that_a_partner_is_gone_is_no_cause(error, lost):
    assert ends.lost_partner(error) is lost


@pytest.mark.parametrize(
    ("told", "exits", "cause"),
    [
        ([{**LOST, "rank": 0}], {1: -9}, "rank 1 was killed by SIGKILL (by the system, if the memory was full)"),
        ([{**LOST, "rank": 0}], {0: 1}, "rank 1, 2 gave no answer any more; rank 0 saw: RuntimeError: gone"),
        (
            [],
            {0: -6, 2: -6},
            "rank 0, 2 was aborted (SIGABRT): by NCCL, if another rank gave no answer any more; still",
        ),
        ([], {0: -6, 1: -9}, "rank 1 was killed by SIGKILL"),
        ([], {1: 3}, "rank 1 ended with exit code 3"),
    ],
)
def test_the_cause_is_who_failed_by_itself(told, exits, cause):
    assert ends.cause(told, exits, processes=3).reason.startswith(cause)


@pytest.mark.skipif(sys.platform == "win32", reason="there, asking for a process would end it")
def test_a_process_that_is_gone_without_a_word_has_failed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / ".ended-pid-0").write_text(str(os.getpid()))
    assert not ends.failed(tmp_path)
    (tmp_path / ".ended-pid-1").write_text(str(gone.pid))
    assert ends.failed(tmp_path)
    (tmp_path / ".ended-done-1").touch()
    assert not ends.failed(tmp_path)
    (tmp_path / ".ended-error-0").touch()
    assert ends.failed(tmp_path)


def test_a_process_group_outside_is_as_the_strategy_says():
    def group(*overrides):
        config = compose("train", ["trainer.accelerator=cpu", *overrides], check=False).config
        return rendezvous._group(config)

    assert group("timeout_seconds=7") == (False, None, timedelta(seconds=7))
    more = ("trainer.strategy.timeout.seconds=9", "+trainer.strategy.process_group_backend=mpi")
    assert group("trainer=ddp", *more) == (False, "mpi", timedelta(seconds=9))


@pytest.mark.slow
def test_what_processes_are_forked_from_touches_no_gpu_and_outlives_a_signal():
    code = """
import os, signal, sys, torch
def touched(*_):
    raise AssertionError("a device was touched")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, touched)
import boltlab.processes.forked
assert not torch.cuda.is_initialized()
others = {f"boltlab.processes.{name}" for name in ("rendezvous", "submit", "launchers")}
assert not others & sys.modules.keys(), "a training in one process needs none of them"
os.kill(os.getpid(), signal.SIGTERM)
from boltlab.ground import signals
signals.only_caught()
try:
    with signals.caught():
        print("not stopped")
except signals.Stopped as e:
    print(e)
os.kill(os.getpid(), signal.SIGTERM)
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped by SIGTERM\n"), done.stderr
