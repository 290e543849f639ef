"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails.
"""

import json
import logging
import multiprocessing
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab import signals
from boltlab.check import process_count
from boltlab.errors import UserError

SHUTDOWN_SECONDS = 15  # that the other processes have after one has failed
_ENDED = ".ended-"  # files of the run folder in which the processes say how they ended
# Of the errors of a process whose partner is gone: not the cause.
_PARTNER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo", "NCCL")


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


def launch(entry: Callable[[str], Any], folder: Path, config: DictConfig) -> None:
    """Runs `entry(folder)` in as many processes as the config asks for; `entry` stands at the top of a module.

    Raises:
        UserError: several nodes are asked for, or a process raised one; the other processes were ended.
        KeyboardInterrupt: Ctrl-C; all processes were ended.
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a process failed in another way.
    """
    processes = process_count(config)
    nodes = int(config.trainer.get("num_nodes", 1))
    if nodes > 1:
        raise UserError(f"trainer.num_nodes={nodes}: one command starts the processes of one machine only")
    keep_freed_memory()
    if processes == 1:
        entry(str(folder))
        return
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8),
        max_restarts=0,  # what failed once is not silently trained again
        signals_to_handle="SIGQUIT",  # the others are for the processes to act on, not for their launcher
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    for left in folder.glob(f"{_ENDED}*"):
        left.unlink()
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they would say is said below, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with signals.caught(at_once=_kill, forward=_forward):
            elastic_launch(settings, _rank)(entry, str(folder))
    except ChildFailedError as e:
        raise _cause(e, folder) from None
    finally:
        stopped = [int(file.read_text()) for file in folder.glob(f"{_ENDED}stop-*")]
        for left in folder.glob(f"{_ENDED}*"):
            left.unlink(missing_ok=True)
    if stopped:
        raise signals.Stopped(max(stopped))


def _forward(signum: int) -> None:
    if sys.platform == "win32":  # where os.kill would end them, and a console tells all of them itself
        return
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signum)


def _kill(_: int) -> None:
    for process in multiprocessing.active_children():
        process.kill()


class ProcessFailed(UserError):
    """One of several processes failed, and all were ended. The last line names it and why; before it its traceback."""

    def __init__(self, reason: str, traceback: str = "") -> None:
        self.reason = reason
        super().__init__(f"{traceback}\n{reason}".strip())


def _cause(error: Any, folder: Path) -> Exception:
    """What ended the run: of several that failed, the one that failed by itself, and not because of another."""
    told = []
    for file in folder.glob(f"{_ENDED}error-*"):
        with suppress(ValueError, OSError):
            told.append(json.loads(file.read_text(encoding="utf-8")))
    told.sort(key=lambda record: record["time"])
    own = [record for record in told if not record["partner"]]
    if own and own[0]["user"]:
        return UserError(own[0]["message"])
    if own:
        return ProcessFailed(f"rank {own[0]['rank']} failed: {own[0]['message']}", own[0]["traceback"])
    killed = {rank: failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    if killed:
        rank, exitcode = next(iter(killed.items()))
        memory = " (by the system, if the memory was full)" if exitcode == -9 else ""
        return ProcessFailed(f"rank {rank} was killed by {signals.name(-exitcode)}{memory}")
    if not told:
        return ProcessFailed(str(error))
    silent = sorted(set(range(int(told[0]["world_size"]))) - {record["rank"] for record in told})
    others = ", ".join(map(str, silent)) or "unknown"
    return ProcessFailed(f"rank {others} gave no answer any more; rank {told[0]['rank']} saw: {told[0]['message']}")


def _rank(entry: Callable[[str], Any], folder: str) -> None:
    """One process of several: how it ended is left where the parent finds it."""
    signals.die_with_parent()
    keep_freed_memory()
    rank = int(os.environ["RANK"])
    try:
        entry(folder)
    except signals.Stopped as e:  # all of them, at the same step: no failure
        (Path(folder) / f"{_ENDED}stop-{rank}").write_text(str(e.signum))
    except BaseException as e:
        message = f"{type(e).__name__}: {e}"
        record = {
            "rank": rank,
            "world_size": os.environ["WORLD_SIZE"],
            "time": time.time(),
            "user": isinstance(e, UserError),
            "partner": any(word in message for word in _PARTNER),
            "message": str(e) if isinstance(e, UserError) else message,
            "traceback": traceback.format_exc(),
        }
        path = Path(folder) / f"{_ENDED}error-{rank}"
        beside = path.with_name(f"{path.name}.new")
        beside.write_text(json.dumps(record), encoding="utf-8")
        beside.replace(path)
        raise SystemExit(1) from None
