"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails; those that torchrun or srun has started are
led by their rank 0 (see `boltlab.world`).
"""

import inspect
import json
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab import runs
from boltlab.config.build import build
from boltlab.config.devices import process_count
from boltlab.ground import signals, started_by
from boltlab.ground.errors import UserError, WorkerError
from boltlab.processes import rendezvous

Entry = Callable[[str, DictConfig], Any]  # what a process of a run does, with its folder and its config

SHUTDOWN_SECONDS = 5  # that the other processes have after one has failed: there is nothing left that they could save
_TELL_SECONDS = 3.0  # that a process which has lost its partner waits to hear why
_hiding_main = threading.Lock()
_LEAVE_SECONDS = 30  # that they have after one has stopped at once: their loggers may still be sending
_AT_ONCE = "at once"
_ENDED = ".ended-"  # files of the run folder in which the processes say how they ended
# Of the RuntimeErrors of a process whose partner is gone: not the cause.
_PARTNER = (
    *("gloo/transport", "Gloo connectFullMesh", "ncclRemoteError", "communicator was aborted"),
    "collective operation timeout",
)
_SEVERAL = re.compile(r"trainer=(ddp|fsdp|deepspeed)|trainer\.devices=(?!1$)|max_restarts=[1-9]")


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    glibc gives large blocks back to the system at once, which clears every page of them when they are asked for again:
    a quarter of a convolutional net's training step on a CPU, and four fifths of a batch's normalization. What a user
    has set in the environment (MALLOC_…) is left as it is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):  # another C library, another system
        import ctypes

        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def launch(entry: Entry, folder: Path, config: DictConfig) -> None:
    """Runs `entry(folder, config)` in as many processes as the config asks for; `entry` stands at the top of a module.

    config: what the folder's config.yaml holds, as it is read again.

    `max_restarts` of the config: how often the processes are started again after one of them has failed; `entry` then
    finds the folder as they have left it.

    Raises:
        UserError: several nodes are asked for, or a process raised one; the other processes were ended.
        ProcessFailed: a process failed in another way; it is named.
        Stopped: the processes were told to stop, and did.
    """
    processes, restarts = process_count(config), int(config.get("max_restarts", 0))
    leader = rendezvous.leading()
    keep_freed_memory()
    if leader is not None:
        _lead(leader, entry, folder, config)
        return
    nodes = int(config.trainer.get("num_nodes", 1))
    if nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: one command starts the processes of one machine only; start it on each node"
            " with torchrun (scripts/torchrun.sh), or with srun (scripts/slurm.sbatch)"
        )
    if processes == 1 and not restarts:
        entry(str(folder), config)
        return
    for restart in range(restarts + 1):
        try:
            _start(entry, folder, config, processes)
            return
        except ProcessFailed as e:
            if restart == restarts or e.told_to_stop:
                raise
            print(f"{e}\nrestart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
            told = runs.read_summary(folder).get("restarts", [])
            runs.write_summary(folder, restarts=[*told, {"time": time.time(), "reason": e.reason}])


def _start(entry: Entry, folder: Path, config: DictConfig, processes: int) -> None:
    """Runs `entry` once in several processes of this machine."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Older releases of torch wait for 30 seconds.
    known = inspect.signature(LaunchConfig).parameters
    timeout: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in known else {}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8),
        max_restarts=0,  # what raised a UserError would fail again: `launch` restarts the rest, and says why
        start_method=start_method(),
        signals_to_handle="SIGQUIT",  # the others are for the processes to act on, not for their launcher
        **timeout,
    )
    _clear(folder)
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
        records = _told(folder)
        if told and all(record["partner"] for record in records):  # they had not all come as far as the others
            raise signals.Stopped(told) from None
        cause = _cause(records, {rank: failure.exitcode for rank, failure in e.failures.items()}, processes)
        if isinstance(cause, ProcessFailed):
            cause.told_to_stop = bool(told)
        raise cause from None
    finally:
        ended.set()
        stopped = _stopped(folder)
        _clear(folder)
    if stopped:
        raise signals.Stopped(stopped)


def expect(overrides: list[str]) -> None:
    """Where overrides seem to ask for several processes, starts beside the composing what they will be forked from."""
    several = any(map(_SEVERAL.match, overrides)) and not any(text.startswith("launcher=") for text in overrides)
    if several and started_by.outside() is None:
        ready()


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
        failed = _failed(folder)
        if failed or any(_AT_ONCE in file.read_text() for file in folder.glob(f"{_ENDED}stop-*")):
            if not ended.wait(SHUTDOWN_SECONDS if failed else _LEAVE_SECONDS):
                for file in folder.glob(f"{_ENDED}pid-*"):
                    with suppress(OSError, ValueError):
                        os.kill(int(file.read_text()), getattr(signal, "SIGKILL", signal.SIGTERM))
            return


def _failed(folder: Path) -> bool:
    """Whether a process has said that it failed, or is gone without a word."""
    if next(folder.glob(f"{_ENDED}error-*"), None):
        return True
    for file in folder.glob(f"{_ENDED}pid-*"):
        with suppress(OSError, ValueError):
            if sys.platform != "win32":  # where it would end the process
                os.kill(int(file.read_text()), 0)
            continue
        rank = file.name.rpartition("-")[2]
        if not any((folder / f"{_ENDED}{word}-{rank}").exists() for word in ("done", "stop")):
            return True
    return False


def _forward(folder: Path, signum: int) -> None:
    if signum != signals.SAVING:
        (folder / f"{_ENDED}told").write_text(str(signum))  # for processes that are not there yet
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
    signals.die_with_parent()
    os.chdir(cwd)
    own = {name: value for name, value in os.environ.items() if name.startswith(started_by.OF_RANKS)}
    os.environ.clear()
    os.environ.update({**started_by.alone(environment), **own})


def _rank(entry: Entry, folder: str, config: DictConfig, cwd: str, environment: dict[str, str]) -> None:
    """One process of several: how it ended is left where the parent finds it."""
    begin_forked(cwd, environment)
    keep_freed_memory()
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    vars(rank_zero_only)["rank"] = int(os.environ["RANK"])  # set when it was imported, by a process that had none
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        from boltlab.data.loader import available_cores

        torch.set_num_threads(max(1, available_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    (Path(folder) / f"{_ENDED}pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    told = Path(folder) / f"{_ENDED}told"
    try:
        with _last_word(Path(folder)), signals.caught():
            if told.exists():
                raise signals.Stopped(int(told.read_text()), at_once=True)
            entry(folder, config)
    except signals.Stopped:  # no failure
        pass
    except BaseException as e:
        signals.inbox.deferred = True
        if _lost_partner(e):  # whose end is to be seen first: it is the cause
            _wait_to_be_told(Path(folder))
        raise SystemExit(1) from None


# ---------------------------------------------------------------- processes from outside


def _lead(leader: Any, entry: Entry, folder: Path, config: DictConfig) -> None:
    """Runs `entry` as rank 0 of processes from outside.

    Where another process fails, its launcher sends this one a signal to stop; the failure is what is told.
    """
    _clear(folder)
    leader.order(follow, entry, folder)
    try:
        with _last_word(folder), rendezvous.joined(*_group(config)):
            entry(str(folder), config)
    except BaseException as e:
        leader.alone = True
        signals.inbox.deferred = True  # the launcher's signal must not hide the cause
        told = _wait_to_be_told(folder) if _lost_partner(e) or isinstance(e, signals.Stopped) else []
        if any(not record["partner"] for record in told):
            raise _cause(told, {}, leader.world.size) from None
        if _lost_partner(e) and (stopped := _stopped(folder)):  # it was told a little earlier
            raise signals.Stopped(stopped) from None
        if _lost_partner(e):
            raise _cause(told, {}, leader.world.size) from None
        raise


def follow(entry: Entry, folder: Path) -> None:
    """Runs `entry` as one of the processes that rank 0 leads; what it raises is printed before it ends.

    Raises:
        Stopped: all of them were told to stop, and did.
    """
    keep_freed_memory()
    rank = os.environ["RANK"]
    try:
        config = runs.load_config(folder, own=True)
        with _last_word(folder), rendezvous.joined(*_group(config)):
            entry(str(folder), config)
    except signals.Stopped:
        raise
    except BaseException as e:
        signals.inbox.deferred = True
        if _lost_partner(e):
            cause = _cause(_wait_to_be_told(folder), {}, int(os.environ["WORLD_SIZE"]))
            print(f"rank {rank} ends: {cause}", file=sys.stderr, flush=True)
        elif not isinstance(e, UserError):  # which rank 0 prints
            traceback.print_exc()
        raise SystemExit(1) from None


def _group(config: DictConfig) -> tuple[bool, str | None, timedelta]:
    """Of a run's process group: whether it is on GPUs, the backend that the strategy names, the timeout."""
    import torch

    on_gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    strategy = config.trainer.get("strategy")
    timeout = timedelta(seconds=config.get("timeout_seconds", 300.0))
    if not isinstance(strategy, DictConfig):
        return on_gpu, None, timeout
    if strategy.get("timeout"):
        timeout = build(config, "trainer.strategy.timeout")
    return on_gpu, strategy.get("process_group_backend"), timeout


def _wait_to_be_told(folder: Path) -> list[dict[str, Any]]:
    end = time.monotonic() + _TELL_SECONDS
    while True:
        told = _told(folder)
        if time.monotonic() > end or any(not record["partner"] for record in told):
            return told
        time.sleep(0.05)


# ---------------------------------------------------------------- how processes ended


class ProcessFailed(UserError):
    """One of several processes failed, and all were ended. The last line names it and why; before it its traceback."""

    told_to_stop = False  # while it failed: what was asked for is an end

    def __init__(self, reason: str, traceback: str = "") -> None:
        self.reason = reason
        super().__init__(f"{traceback}\n{reason}".strip())


@contextmanager
def _last_word(folder: Path) -> Iterator[None]:
    """Leaves in the folder how this process has ended."""
    rank = int(os.environ["RANK"])
    try:
        yield
        (folder / f"{_ENDED}done-{rank}").touch()
    except signals.Stopped as e:
        (folder / f"{_ENDED}stop-{rank}").write_text(f"{e.signum} {_AT_ONCE * e.at_once}")
        raise
    except BaseException as e:
        record = {
            "rank": rank,
            "time": time.time(),
            "user": isinstance(e, UserError) and not isinstance(e, WorkerError),  # which a restart may mend
            "partner": _lost_partner(e),
            "message": str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}",
            "traceback": "" if isinstance(e, WorkerError) else traceback.format_exc(),
        }
        with suppress(OSError):
            runs.write_json(folder / f"{_ENDED}error-{rank}", record)
        raise


def _lost_partner(error: BaseException) -> bool:
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # without an import of torch
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PARTNER)


def _stopped(folder: Path) -> int:
    """The signal by which a process was stopped; 0 where none was."""
    return max((int(file.read_text().split()[0]) for file in folder.glob(f"{_ENDED}stop-*")), default=0)


def _clear(folder: Path) -> None:
    for left in folder.glob(f"{_ENDED}*"):
        left.unlink(missing_ok=True)


def _told(folder: Path) -> list[dict[str, Any]]:
    told = []
    for file in folder.glob(f"{_ENDED}error-*"):
        with suppress(ValueError, OSError):
            told.append(json.loads(file.read_text(encoding="utf-8")))
    return sorted(told, key=lambda record: record["time"])


def _cause(told: list[dict[str, Any]], exits: dict[int, int], processes: int) -> UserError:
    """What ended the run: of several that failed, the one that failed by itself, and not because of another.

    exits: of each rank that has failed its exit code, where that is known; negative where a signal ended it.
    """
    own = [record for record in told if not record["partner"]]
    if own and own[0]["user"]:
        return UserError(own[0]["message"])
    if own:
        return ProcessFailed(f"rank {own[0]['rank']} failed: {own[0]['message']}", own[0]["traceback"])
    aborted = {rank for rank, code in exits.items() if code == -signal.SIGABRT}
    killed = {rank: code for rank, code in exits.items() if code < 0 and rank not in aborted}
    if aborted and not killed:
        others = ", ".join(str(rank) for rank in range(processes) if rank not in aborted) or "none"
        ended = ", ".join(map(str, sorted(aborted)))
        why = f"by NCCL, if another rank gave no answer any more; still there: {others}"
        return ProcessFailed(f"rank {ended} was aborted (SIGABRT): {why}")
    if killed:
        rank, exitcode = next(iter(killed.items()))
        memory = " (by the system, if the memory was full)" if exitcode == -9 else ""
        return ProcessFailed(f"rank {rank} was killed by {signals.name(-exitcode)}{memory}")
    if not told:
        ended = ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in sorted(exits.items()))
        return ProcessFailed(ended or "a process is gone")
    saw = f"rank {told[0]['rank']} saw: {told[0]['message']}"
    silent = sorted(set(range(processes)) - {record["rank"] for record in told})
    if not silent:
        return ProcessFailed(f"the processes have lost one another; {saw}")
    return ProcessFailed(f"rank {', '.join(map(str, silent))} gave no answer any more; {saw}")
