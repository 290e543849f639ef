"""Records what repeating a run needs: git commit and patch, machine, package versions."""

import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boltlab.config import project
from boltlab.ground import credentials

if TYPE_CHECKING:
    from concurrent.futures import Future


@dataclass(frozen=True)
class Git:
    """The clone of the project, else of the engine: its commit, whether it is changed since, and how, as a patch."""

    commit: str | None
    dirty: bool | None
    patch: bytes
    left_out: tuple[str, ...] = ()


def ask_git() -> "Future[Git]":
    """Asks git in the background: it has answered long before torch is imported."""
    from concurrent.futures import Future

    answer: Future[Git] = Future()

    def ask() -> None:
        try:
            answer.set_result(_state())
        except BaseException as e:  # raised where the answer is wanted
            answer.set_exception(e)

    threading.Thread(target=ask, daemon=True).start()
    return answer


def environment(git: Git) -> dict[str, Any]:
    """Git commit, machine and package versions: what it takes to repeat a run. Holds no environment variables."""
    import torch

    own = project.find()
    named = {key: getattr(own, key) for key in ("name", "package", "version")} if own and own.trusted else None
    return {
        **({"project": named} if named else {}),
        "git_commit": git.commit,
        "git_dirty": git.dirty,
        "git_left_out": list(git.left_out),  # of git.patch, because of their names
        "command": [credentials.masked(argument) for argument in sys.argv],
        "cwd": os.getcwd(),  # what relative paths in the config are relative to
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": packages(),
    }


def commit_changes(then: str, now: str) -> str | None:
    """How many files and lines differ between two commits; None where this clone does not know both."""
    if not all(re.fullmatch("[0-9a-f]{7,64}", commit) for commit in (then, now)):
        return None
    answer = _git("diff", "--shortstat", then, now, "--")
    return None if answer is None else answer.decode(errors="replace").strip() or "the same files"


def clone() -> Path | None:
    """The folder of the clone that this code runs from."""
    answer = _git("rev-parse", "--show-toplevel")
    return Path(answer.decode(errors="surrogateescape").strip()) if answer else None


@functools.cache
def packages() -> dict[str, str]:
    """Name and version of all that is installed, when it was first asked for: what is imported is of those. Only these
    two lines are read: parsing all metadata takes 0.1 s."""
    import importlib.metadata

    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        header = dict(re.findall(r"^(Name|Version): *(.*\S)", text.partition("\n\n")[0], re.MULTILINE))
        if len(header) == 2:
            found.setdefault(header["Name"], header["Version"])  # of several, Python imports the first
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def _state() -> Git:
    """The clone's commit, and its changes since as a patch, new files included: in an index of its own, so that git's
    stays. Files that hold keys or passwords by their names are left out of it."""
    status = _git("status", "--porcelain=v2", "--branch", "-z", "--no-renames", "--untracked-files=all") or b""
    entries = [os.fsdecode(entry) for entry in status.split(b"\0")]
    commit = next((line.split()[-1] for line in entries if line.startswith("# branch.oid ")), "(initial)")
    if commit == "(initial)":  # none yet, no clone, no git
        return Git(None, None, b"")
    # The path is what stands behind so many words: 1 <7 others>, u <9 others>, ? or !
    words = {"1": 8, "u": 10, "?": 1}
    changed = [line.split(" ", words[line[0]])[-1] for line in entries if line[:1] in words]
    left_out = tuple(path for path in changed if credentials.private(path))
    if not changed:
        return Git(commit, False, b"")
    taken = [":/", *(f":(exclude,top,literal){path}" for path in left_out)]
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        if _git("read-tree", "HEAD", **index) is None or _git("add", "--all", "--", *taken, **index) is None:
            return Git(commit, True, b"", left_out)
        return Git(commit, True, _git("diff", "--cached", "--binary", "HEAD", **index) or b"", left_out)


def _git(*arguments: str, **variables: str) -> bytes | None:
    """What git says of the project's clone, else of the one that the engine runs from; None without git or a clone."""
    own = project.find()
    folder = own.root if own is not None and own.trusted else Path(__file__).parent
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, env={**os.environ, **variables})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
