"""How the processes of a run ended: each writes a file into the run folder; together they name the cause."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.ground import signals
from boltlab.ground.errors import UserError, WorkerError

AT_ONCE = "at once"
ENDED = ".ended-"  # files of the run folder in which the processes say how they ended
_TELL_SECONDS = 3.0  # that a process which has lost its partner waits to hear why
# Of the RuntimeErrors of a process whose partner is gone: not the cause.
_PARTNER = (
    *("gloo/transport", "Gloo connectFullMesh", "ncclRemoteError", "communicator was aborted"),
    "collective operation timeout",
)


class ProcessFailed(UserError):
    """One of several processes failed, and all were ended. The last line names it and why; before it its traceback."""

    told_to_stop = False  # while it failed: what was asked for is an end

    def __init__(self, reason: str, traceback: str = "") -> None:
        self.reason = reason
        super().__init__(f"{traceback}\n{reason}".strip())


@contextmanager
def last_word(folder: Path) -> Iterator[None]:
    """Writes into the folder how this process has ended."""
    rank = int(os.environ["RANK"])
    try:
        yield
        (folder / f"{ENDED}done-{rank}").touch()
    except signals.Stopped as e:
        (folder / f"{ENDED}stop-{rank}").write_text(f"{e.signum} {AT_ONCE * e.at_once}")
        raise
    except BaseException as e:
        from boltlab.processes.explained import explained

        said = explained(e)
        record = {
            "rank": rank,
            "time": time.time(),
            "user": said is not None and not isinstance(e, WorkerError),  # which a restart may mend
            "partner": lost_partner(e),
            "message": said or f"{type(e).__name__}: {e}",
            "traceback": "" if isinstance(e, WorkerError) else traceback.format_exc(),
        }
        with suppress(OSError):
            runs.write_json(folder / f"{ENDED}error-{rank}", record)
        raise


def lost_partner(error: BaseException) -> bool:
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # without an import of torch
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PARTNER)


def stopped_by(folder: Path) -> int:
    """The signal by which a process was stopped; 0 where none was."""
    return max((int(file.read_text().split()[0]) for file in folder.glob(f"{ENDED}stop-*")), default=0)


def clear(folder: Path) -> None:
    for left in folder.glob(f"{ENDED}*"):
        left.unlink(missing_ok=True)


def reports(folder: Path) -> list[dict[str, Any]]:
    told = map(runs.read_json, folder.glob(f"{ENDED}error-*"))
    return sorted(filter(None, told), key=lambda record: record["time"])


def failed(folder: Path) -> bool:
    """Whether a process has reported a failure, or is gone without a report."""
    if next(folder.glob(f"{ENDED}error-*"), None):
        return True
    for file in folder.glob(f"{ENDED}pid-*"):
        with suppress(OSError, ValueError):
            if sys.platform != "win32":  # where it would end the process
                os.kill(int(file.read_text()), 0)
            continue
        rank = file.name.rpartition("-")[2]
        if not any((folder / f"{ENDED}{word}-{rank}").exists() for word in ("done", "stop")):
            return True
    return False


def wait_for_reports(folder: Path) -> list[dict[str, Any]]:
    end = time.monotonic() + _TELL_SECONDS
    while True:
        told = reports(folder)
        if time.monotonic() > end or any(not record["partner"] for record in told):
            return told
        time.sleep(0.05)


def cause(told: list[dict[str, Any]], exits: dict[int, int], processes: int) -> UserError:
    """The error that ended the run: of several failed processes, that of the one that failed by itself.

    exits: of each rank that has failed its exit code, where that is known; negative where a signal ended it.
    """
    own = [record for record in told if not record["partner"]]
    if own and own[0]["user"]:
        return UserError(own[0]["message"])
    if own:
        return ProcessFailed(f"rank {own[0]['rank']} failed: {own[0]['message']}", own[0]["traceback"])
    signalled = {rank: code for rank, code in exits.items() if code < 0}
    if signalled:
        return ProcessFailed(_by_signal(signalled, processes))
    if not told:
        ended = ", ".join(f"rank {rank} ended with exit code {code}" for rank, code in sorted(exits.items()))
        return ProcessFailed(ended or "a process is gone")
    saw = f"rank {told[0]['rank']} saw: {told[0]['message']}"
    silent = ", ".join(map(str, sorted(set(range(processes)) - {record["rank"] for record in told})))
    lost = f"rank {silent} gave no answer any more" if silent else "the processes have lost one another"
    return ProcessFailed(f"{lost}; {saw}")


def _by_signal(exits: dict[int, int], processes: int) -> str:
    """Of ranks that signals ended: NCCL aborts those whose partner is gone, so another signal is the cause."""
    for rank, code in exits.items():
        if code != -signal.SIGABRT:
            memory = " (by the system, if the memory was full)" if code == -9 else ""
            return f"rank {rank} was killed by {signals.name(-code)}{memory}"
    ended, others = ", ".join(map(str, sorted(exits))), ", ".join(str(r) for r in range(processes) if r not in exits)
    why = f"by NCCL, if another rank gave no answer any more; still there: {others or 'none'}"
    return f"rank {ended} was aborted (SIGABRT): {why}"
