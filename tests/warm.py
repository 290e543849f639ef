"""A process that has imported everything and forks one child a command: a `boltlab` that starts in no time, and can be
killed like any other."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import torch
from waiting import until

SERVER = """
import json, os, sys
import boltlab.commands.train, boltlab.processes.launch, boltlab.training.load, boltlab.training.trainer
import boltlab.training.resume
import boltlab.callbacks.last, boltlab.callbacks.progress, project.models.classifier, project.data.digits, torch
from boltlab.__main__ import main
from boltlab.processes.several import start_method
from multiprocessing import forkserver
start_method()
# The children share it; what its processes print is nobody's.
answers, errors, nowhere = os.fdopen(os.dup(1), "w"), os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 1), os.dup2(nowhere, 2)
forkserver.ensure_running()
os.dup2(errors, 2)
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        if "OWN_FORKSERVER" in os.environ:
            forkserver._forkserver._forkserver_pid = None
        else:
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        code = 1
        try:
            exec(request["before"])
            code = main(request["arguments"])
        except SystemExit as e:
            code = e.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            import multiprocessing
            for process in multiprocessing.active_children():
                if process.daemon:  # ended as at the exit of the command, which waits for one that does not obey
                    process.terminate()
                    process.join()
            sys.stdout.flush(); sys.stderr.flush()
            import logging; logging.shutdown()
            os._exit(code or 0)
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


class Child:
    """One `boltlab` command. `before` is Python that runs in it first: where a test needs a step to be slow."""

    def __init__(self, server, arguments, cwd, before, environment):
        self.out, self.err = cwd / f"out-{time.time_ns()}", cwd / f"err-{time.time_ns()}"
        request = {"arguments": list(arguments), "cwd": str(cwd), "before": before, "environment": environment}
        server.stdin.write(json.dumps({**request, "out": str(self.out), "err": str(self.err)}) + "\n")
        server.stdin.flush()
        self.server, self.pid = server, int(server.stdout.readline())

    def send(self, signum):
        os.kill(self.pid, signum)

    def running(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    @staticmethod
    def pause(seconds):
        time.sleep(seconds)

    def wait_for(self, path, pattern=None):
        until(lambda: list(path.glob(pattern)) if pattern else path.exists())

    def wait(self):
        """The exit code; negative where a signal ended it."""
        self.code = int(self.server.stdout.readline())
        self.stdout = self.out.read_text() if self.out.exists() else ""
        self.stderr = self.err.read_text() if self.err.exists() else ""
        return self


def only_run(log_dir="logs"):
    (folder,) = (p.parent for p in Path(log_dir, "train").glob("*/config.yaml"))
    return folder


TIMES = {"samples_per_second", "data_wait_share"}


def outcome(folder, which="last"):
    """All that must be equal, bit for bit, whether a run was interrupted or not: weights, what optimizer, schedules,
    metrics and callbacks know, and the rows of metrics.csv without the times."""
    content = torch.load(folder / "checkpoints" / f"{which}.ckpt", weights_only=True)
    kept = {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    kept["others"] = {k: content[k] for k in ("current_model_state", "averaging_state", "exact") if k in content}
    callbacks = content["callbacks"]
    kept["callbacks"] = {
        key: {
            k: v for k, v in state.items() if "path" not in k and k not in ("dirpath", "best_k_models", "current_score")
        }
        for key, state in callbacks.items()
        if isinstance(state, dict) and not key.startswith(("Throughput", "Timer"))
    }
    with (folder / "metrics.csv").open() as file:
        kept["rows"] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    kept["rows"] = [dict(sorted(row.items())) for row in kept["rows"]]
    return kept


def differences(a, b, path=""):
    """Where two outcomes differ in a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1), b.reshape(-1))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {*a, *b} for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {str(a)[:60]} / {str(b)[:60]}"]


def at_step(step, signum=signal.SIGKILL, hook="on_train_batch_end"):
    """Python for `before`: the process sends itself a signal after that optimizer step."""
    return f"""
from boltlab.callbacks.last import Last
def hook(self, trainer, *arguments, _original=Last.{hook}, **keywords):
    _original(self, trainer, *arguments, **keywords)
    if trainer.global_step >= {step} and not hasattr(Last, "sent"):
        Last.sent = True
        os.kill(os.getpid(), {int(signum)})
Last.{hook} = hook
"""


# Python for `before`: the processes of a run are forked from this one, which has imported everything.
FORKED = """
import socket, torch, traceback
import boltlab.processes.launch
from boltlab.config.devices import process_count
torch.set_num_threads(1)

def launch(entry, folder, config):
    processes = process_count(config)
    if processes == 1:
        entry(str(folder), config)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            # The first to ask for torch's pool of threads after a fork makes a new one: not several threads at once,
            # such as those that the engine of autograd starts under FSDP2 ("Invalid thread pool!").
            torch.set_num_threads(1)
            boltlab.ground.signals.die_with_parent()
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                entry(str(folder), config)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise boltlab.ground.errors.UserError(f"exit codes of the processes: {codes}")

import boltlab.commands.eval, boltlab.commands.predict, boltlab.ground.errors
for module in (boltlab.processes.launch, boltlab.commands.eval, boltlab.commands.predict):
    module.launch = launch
"""
