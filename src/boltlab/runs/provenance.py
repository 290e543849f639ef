"""Records what repeating a run needs: git commit and patch, machine, package versions."""

import functools
import os
import platform
import re
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boltlab.config import project
from boltlab.ground import credentials

if TYPE_CHECKING:
    from concurrent.futures import Future

_NOT_OURS = ["DIR", "WORK_TREE", "INDEX_FILE", "OBJECT_DIRECTORY", "ALTERNATE_OBJECT_DIRECTORIES", "PREFIX"]
_NOT_OURS = [f"GIT_{name}" for name in (*_NOT_OURS, "DIFF_OPTS", "LITERAL_PATHSPECS", "TRACE")]
_SETTINGS = [
    "core.hooksPath=/dev/null",
    "core.quotePath=false",
    "core.splitIndex=false",
    "core.safecrlf=false",
    "core.fsmonitor=false",
]
_SETTINGS = [word for setting in _SETTINGS for word in ("-c", setting)]


@dataclass(frozen=True)
class Git:
    """The clone of the project, else of the engine: its commit, whether it is changed since, and how, as a patch."""

    commit: str | None
    dirty: bool | None
    patch: bytes
    left_out: tuple[str, ...] = ()
    problem: str | None = None  # why some of it is not known


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
        "git_left_out": [*git.left_out[:100], *[f"… and {len(git.left_out) - 100} more"] * (len(git.left_out) > 100)],
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


def is_commit(text: Any) -> bool:
    """Whether it is a commit's hash, and nothing that a shell or git would take for another word."""
    return isinstance(text, str) and bool(re.fullmatch("[0-9a-f]{7,64}", text))


def commit_changes(then: str, now: str) -> str | None:
    """How many files and lines differ between two commits; None where this clone does not know both."""
    if not (is_commit(then) and is_commit(now)):
        return None
    try:
        return _git("diff", "--shortstat", then, now, "--").decode(errors="replace").strip() or "the same files"
    except _GitFailed:
        return None


def clone() -> Path | None:
    """The folder of the clone that this code runs from."""
    try:
        return Path(os.fsdecode(_git("rev-parse", "--show-toplevel"))[:-1])
    except _GitFailed:
        return None


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
    """The clone's commit, and its changes since as a patch, new files included."""
    commit = None
    try:
        status = _git("status", "--porcelain=v2", "--branch", "-z", "--no-renames", "--untracked-files=all")
        entries = [os.fsdecode(entry) for entry in status.split(b"\0")]
        commit = next((line.split()[-1] for line in entries if line.startswith("# branch.oid ")), "(initial)")
        if commit == "(initial)":  # none yet
            return Git(None, None, b"")
        # The path is what stands behind so many words: 1 <7 others>, u <9 others> or ?
        words = {"1": 8, "u": 10, "?": 1}
        split = [line.split(" ", words[line[0]]) for line in entries if line[:1] in words]
        changed = {path: about for *about, path in split}
        if not changed:
            return Git(commit, False, b"")
        from boltlab.runs import patch

        return Git(commit, True, *patch.make(_git, _folder(), commit, changed))
    except _NoClone:
        return Git(None, None, b"")
    except _GitFailed as e:
        with suppress(_GitFailed):
            commit = commit or os.fsdecode(_git("rev-parse", "--verify", "HEAD")).strip()
        lost = "git.patch lacks what is not committed" if commit else "the commit is not recorded"
        return Git(commit, True if commit else None, b"", problem=f"{lost}, for git said: {e}")


class _GitFailed(Exception):
    """git did not do what it was asked; the message is git's."""


class _NoClone(_GitFailed):
    """There is no git, or the code lies in no clone."""


def _folder() -> Path:
    own = project.find()
    return own.root if own is not None and own.trusted else Path(__file__).parent


def _git(*arguments: str, stdin: bytes = b"", **variables: str) -> bytes:
    """What git says of the project's clone, else of the one that the engine runs from; in C's words.

    Raises:
        _GitFailed: it refuses, takes too long, or there is none.
    """
    # A hook's variables would name another clone; settings would write beside the clone or refuse line ends.
    ours = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
    command = ["git", "-C", str(_folder()), *_SETTINGS, *arguments]
    try:
        env = {**ours, **variables, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=20, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise _GitFailed("nothing, for 20 s") from None
    except OSError as e:
        raise _NoClone(e) from e
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise (_NoClone if "not a git repository (or any" in said else _GitFailed)(credentials.masked(said[-500:]))
    return done.stdout
