"""Whether a run is running: its lock, its process, and the status that follows."""

import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from boltlab.config.sources import targets
from boltlab.ground.errors import UserError
from boltlab.runs.lookup import shown


class Status(StrEnum):
    """What a run is. Its summary says the first six; its lock, its process and its cluster say the others."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    PRUNED = "pruned"
    FAILED = "failed"
    FINISHED = "finished"
    KILLED = "killed"
    PREEMPTED = "preempted"  # it waits again after it has run
    CANCELLED = "cancelled"
    NOT_STARTED = "not started"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> "Status":
        return cls.UNKNOWN  # a summary may come from anybody

    @property
    def at_work(self) -> bool:
        """Whether nobody else may begin it."""
        return self in (Status.QUEUED, Status.PREEMPTED, Status.RUNNING)

    @property
    def resumable(self) -> bool:
        return self in (Status.INTERRUPTED, Status.KILLED, Status.CANCELLED, Status.NOT_STARTED)

    @property
    def colour(self) -> str:
        """As rich names colours."""
        return _COLOURS.get(self, "white")


_COLOURS = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow", "running": "cyan"}
_COLOURS |= {"queued": "blue", "preempted": "magenta", "cancelled": "yellow", "pruned": "bright_black"}


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps every other process out of the folder of a run or a sweep. The system frees it when this process dies.

    Raises:
        UserError: another process, named in the message, holds it.
    """
    from filelock import FileLock, Timeout

    holder = folder / ".lock-holder"  # Windows lets nobody read what is locked
    try:
        held = FileLock(folder / ".lock").acquire(timeout=1)  # not 0: `status` takes it for an instant
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
        raise UserError(f"{shown(folder)} is being written by another process ({who}): let it end first") from None
    with held:
        holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _locked(folder: Path) -> bool | None:
    """Whether a process holds the folder; None where that cannot be told: no lock file, or another user's."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").is_file():
        return None
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return None


def status(summary: dict[str, Any], folder: Path | None = None, job: str | None = None) -> Status:
    """The status of a run; one that says `running` while its process is gone was killed.

    A lock on `folder` that nobody holds proves it; where there is none, the pid counts, which another may have by now.
    `job`: what the cluster says, for a run that was given to one (`job_states`).
    """
    state = Status(summary.get("status", "unknown"))
    if job in ("queued", "preempted") and state not in (Status.FINISHED, Status.FAILED):
        return Status(job)
    if job == "running" and state in (Status.QUEUED, Status.INTERRUPTED):  # its process begins, or ends
        return Status.RUNNING
    here = summary.get("host") in (None, platform.node())
    if state is Status.QUEUED:
        return _queued(job, here and not _alive(summary.get("pid")))
    if state is not Status.RUNNING or job == "running":
        return state
    locked = _locked(folder) if folder is not None else None
    if locked is None:
        locked = not here or _alive(summary.get("pid"))
    return Status.RUNNING if locked else Status.KILLED


def _queued(job: str | None, launcher_gone: bool) -> Status:
    """The status of a queued run; one that no cluster knows waits for the command that queued it."""
    if job == "cancelled":
        return Status.CANCELLED
    return Status.NOT_STARTED if job == "gone" or (job is None and launcher_gone) else Status.QUEUED


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    if sys.platform == "win32":  # os.kill(pid, 0) would end the process there
        listing = subprocess.run(["tasklist", "/FI", f"PID eq {pid}"], capture_output=True, text=True, check=False)
        return str(pid) in listing.stdout
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def job_states(folders: Iterable[Path]) -> dict[Path, str]:
    """What clusters say of the runs that were given to them (those with a `job.json`): queued, preempted (waiting again
    after it has run), running, cancelled, gone; unknown where one does not answer.

    A launcher whose jobs outlive the command that has started them tells it by `states(folders)`, a static method.
    """
    given = [folder for folder in folders if (folder / "job.json").exists()]
    known: dict[Path, str] = {}
    for target in targets("launcher") if given else ():
        try:
            states = pkgutil.resolve_name(f"{target}.states")
        except (ImportError, AttributeError):  # it is not there, or its jobs end with their command
            continue
        known |= states(given)
    return known
