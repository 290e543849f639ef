"""Several processes of one machine, started by torch's elastic launcher, which ends all of them when one fails."""

import logging
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab import runs
from boltlab.ground import signals, started_by
from boltlab.ground.malloc import keep_freed_memory
from boltlab.ground.output import keep_going
from boltlab.processes import ends

SHUTDOWN_SECONDS = 5  # that the other processes have after one has failed: there is nothing left that they could save
_LEAVE_SECONDS = 30  # that they have after one has stopped at once: their loggers may still be sending
_hiding_main = threading.Lock()


def run(entry: Callable[..., Any], folder: Path, config: DictConfig, processes: int, restarts: int) -> None:
    """Runs `entry` in that many processes, which are started again, at most `restarts` times, after one has failed."""
    for restart in range(restarts + 1):
        try:
            _start(entry, folder, config, processes)
            return
        except ends.ProcessFailed as e:
            if restart == restarts or e.told_to_stop:
                raise
            print(f"{e}\nrestart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
            told = runs.read_summary(folder).get("restarts", [])
            runs.write_summary(folder, restarts=[*told, {"time": time.time(), "reason": e.reason}])


def _start(entry: Callable[..., Any], folder: Path, config: DictConfig, processes: int) -> None:
    """Runs `entry` once in several processes of this machine."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8),
        max_restarts=0,  # what raised a UserError would fail again: `run` restarts the rest, and says why
        start_method=start_method(),
        signals_to_handle="SIGQUIT",  # the others are for the processes to act on, not for their launcher
    )
    ends.clear(folder)
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they would say is said below, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ended, told = threading.Event(), 0
    threading.Thread(target=_end_what_hangs, args=(folder, ended), daemon=True).start()
    try:
        with signals.caught(at_once=_kill, forward=partial(_forward, folder)), nothing_to_import():
            try:
                elastic_launch(settings, _rank)(entry, str(folder), config, os.getcwd(), dict(os.environ))
            finally:
                told = signals.inbox.stop
    except ChildFailedError as e:
        records = ends.reports(folder)
        if told and all(record["partner"] for record in records):  # they had not all come as far as the others
            raise signals.Stopped(told) from None
        cause = ends.cause(records, {rank: failure.exitcode for rank, failure in e.failures.items()}, processes)
        if isinstance(cause, ends.ProcessFailed):
            cause.told_to_stop = bool(told)
        raise cause from None
    finally:
        ended.set()
        stopped = ends.stopped_by(folder)
        ends.clear(folder)
    if stopped:
        raise signals.Stopped(stopped)


def ready() -> None:
    """Starts what processes are forked from, if it is not there yet."""
    if start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        ensure_running()


def start_method() -> str:
    """Processes are forked from one that has imported everything: a restart, or the next job of a sweep, takes a
    second instead of eight."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["boltlab.processes.forked"])
    return "forkserver"


@contextmanager
def nothing_to_import() -> Iterator[None]:
    """Else each process would run the script that has called us once more, down to this call."""
    with _hiding_main:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _end_what_hangs(folder: Path, ended: threading.Event) -> None:
    """Where a process has failed, or stopped at once, ends those that do not end by themselves: the elastic launcher
    waits a minute, and one that waits for its partners in torch hears no signal."""
    while not ended.wait(1.0):
        failed = ends.failed(folder)
        if failed or any(ends.AT_ONCE in file.read_text() for file in folder.glob(f"{ends.ENDED}stop-*")):
            if not ended.wait(SHUTDOWN_SECONDS if failed else _LEAVE_SECONDS):
                for file in folder.glob(f"{ends.ENDED}pid-*"):
                    with suppress(OSError, ValueError):
                        os.kill(int(file.read_text()), getattr(signal, "SIGKILL", signal.SIGTERM))
            return


def _forward(folder: Path, signum: int) -> None:
    if signum != signals.SAVING:
        (folder / f"{ends.ENDED}told").write_text(str(signum))  # for processes that are not there yet
    if sys.platform == "win32":  # where os.kill would end them, and a console tells all of them itself
        return
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signum)


def _kill(_: int) -> None:
    for process in multiprocessing.active_children():
        process.kill()


def begin_forked(cwd: str, environment: dict[str, str]) -> None:
    """What a process does first that was forked from the server: that one outlives the parent, and was started perhaps
    before the folder, or a variable, was another. `environment` is that of the parent."""
    signals.only_caught()
    keep_going(says_all=True)
    signals.die_with_parent()
    os.chdir(cwd)
    own = {name: value for name, value in os.environ.items() if name.startswith(started_by.OF_RANKS)}
    os.environ.clear()
    os.environ.update({**started_by.alone(environment), **own})


def _rank(entry: Callable[..., Any], folder: str, config: DictConfig, cwd: str, environment: dict[str, str]) -> None:
    """One process of several: how it ended is left where the parent finds it."""
    begin_forked(cwd, environment)
    keep_freed_memory()
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    vars(rank_zero_only)["rank"] = int(os.environ["RANK"])  # set when it was imported, by a process that had none
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        from boltlab.data.loader import available_cores

        torch.set_num_threads(max(1, available_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    (Path(folder) / f"{ends.ENDED}pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    told = Path(folder) / f"{ends.ENDED}told"
    try:
        with ends.last_word(Path(folder)), signals.caught():
            if told.exists():
                raise signals.Stopped(int(told.read_text()), at_once=True)
            entry(folder, config)
    except signals.Stopped:  # no failure
        pass
    except BaseException as e:
        signals.inbox.deferred = True
        if ends.lost_partner(e):  # whose end is to be seen first: it is the cause
            ends.wait_for_reports(Path(folder))
        raise SystemExit(1) from None
