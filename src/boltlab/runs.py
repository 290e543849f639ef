"""The run folder: making it, finding it, reading it.

logs/<verb>/<date>_<time>_<name>-<id>/
    config.yaml        the resolved config        environment.json   commit, hardware, packages
    overrides.yaml     what the command line said git.patch          uncommitted changes
    metrics.csv        every logged value         summary.json       status, final and best metrics, times
    classes.json       the class names            checkpoints/       best.ckpt, last.ckpt
    data.json          what data each split had
"""

import functools
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import OmegaConfDumper
from omegaconf.errors import OmegaConfBaseException

from boltlab.config import project
from boltlab.ground import credentials, started_by
from boltlab.ground.errors import UserError
from boltlab.ground.signals import Stopped

if TYPE_CHECKING:
    from concurrent.futures import Future

COLOURS = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow", "running": "cyan"}
COLOURS |= {"queued": "blue", "preempted": "magenta", "cancelled": "yellow", "pruned": "bright_black"}
AT_WORK = ("queued", "preempted", "running")  # nobody else may begin it

_ALIAS = re.compile(r"(^|[\s\[{,:])\*\w", re.MULTILINE)  # a few of them make a file of a gigabyte

# Stands for the run folder in the saved config, so that a folder that was moved still reads right.
_HERE = "@RUN_DIR@"


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values only, with numbers as OmegaConf writes them: 1e-3 is one, a date is a text."""


_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]\d+)?|\.(inf|Inf|INF))$"
    r"|\.(nan|NaN|NAN)$"
)
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, fits) for tag, fits in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """Texts that would be read as something else in quotes, as OmegaConf writes them."""


_Dumper.add_representer(str, OmegaConfDumper.str_representer)


def new_folder(log_dir: str | Path, verb: str, name: str) -> Path:
    """Makes `<log_dir>/<verb>/<date>_<time>_<name>-<id>`, which no other start can get, not even in the same second."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or verb
    parent = Path(log_dir) / verb
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            # It begins with a letter: `run=903859` and `run=12e345` would be read as numbers.
            number = secrets.choice("abcdf") + secrets.token_hex(3)[1:]
            folder = parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{safe}-{number}"
            try:
                folder.mkdir()
                return folder.resolve()
            except FileExistsError:
                continue
    except OSError as e:
        raise UserError(f"cannot make a run folder in {parent}: {e.strerror}; choose another with log_dir=…") from e


def shown(folder: Path) -> Path:
    """The folder as it is printed: relative to the current one where it lies inside."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def place(folder: Path) -> tuple[str | None, str | None]:
    """The name of the sweep that a run is a job of, and whether the run is of "train", "eval" or, of a sweep, "trial".

    Read from where the folder stands; (None, None) elsewhere.
    """
    parent = folder.resolve().parent
    if parent.name in ("train", "eval"):
        return None, parent.name
    return (parent.name, "trial") if parent.parent.name == "train" else (None, None)


def prepare(
    folder: Path,
    config: DictConfig,
    overrides: list[str],
    git: "Future[Git] | None" = None,
    status: Literal["running", "queued"] = "running",
) -> None:
    """Writes into a new folder all that is known before the run starts; `git` is asked here if it was not before.

    A queued run is started later, perhaps on another machine: what its environment is, is written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / ".run").touch(exist_ok=False)  # of two at once, one
    except FileExistsError:
        raise UserError(f"{folder} holds a run already; each run gets a folder of its own") from None
    write_summary(folder, status=status, started=time.time(), pid=os.getpid(), host=platform.node())
    write_summary(folder, start={"of": started_by.start()[0], "overrides": list(overrides)})
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=True), encoding="utf-8")
    if status == "running":
        _write_environment(folder, git)
    class_names = config.get("data", {}).get("class_names")
    if class_names:
        (folder / "classes.json").write_text(json.dumps(list(class_names), ensure_ascii=False), encoding="utf-8")
    write_config(folder, config)  # at the end: a folder without it is no run yet


def _write_environment(folder: Path, git: "Future[Git] | None") -> None:
    answer = (git or ask_git()).result()
    (folder / "environment.json").write_text(json.dumps(environment(answer), indent=1), encoding="utf-8")
    (folder / "git.patch").write_bytes(answer.patch)


def record_start(folder: Path, config: DictConfig | None, git: "Future[Git] | None" = None) -> None:
    """Writes that a queued run begins, here and now; the config, where it is not as it was queued."""
    _write_environment(folder, git)
    if config is not None:
        write_config(folder, config)
    running = {"status": "running", "pid": os.getpid(), "host": platform.node(), "reason": None}
    write_summary(folder, **running, started=time.time())


def write_config(folder: Path, config: DictConfig) -> None:
    """Writes the resolved config, secrets as references, and sets its `run_dir`."""
    config.run_dir = _HERE
    plain = credentials.plain(config)
    text = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    write_whole(folder / "config.yaml", text.replace(_HERE, "${run_dir}"))
    config.run_dir = str(folder)


def record_resume(
    folder: Path,
    config: DictConfig,
    overrides: list[str],
    checkpoint: str | None,
    changed: list[tuple[str, Any, Any]],
    git: "Future[Git] | None" = None,
) -> None:
    """Writes that a run goes on: its config as it is now, and in the summary what was changed, when and where."""
    write_config(folder, config)
    summary, commit = read_summary(folder), (git or ask_git()).result().commit
    this = {"time": time.time(), "host": platform.node(), "git_commit": commit, "checkpoint": checkpoint}
    this |= {"overrides": overrides, "changed": changed, "seconds": summary.get("seconds", 0.0)}
    running = {"status": "running", "pid": os.getpid(), "host": platform.node(), "reason": None}
    start, restarts = started_by.start()
    if start and not restarts:
        running["start"] = {"of": start, "overrides": overrides}
    write_summary(folder, **running, resumed=[*summary.get("resumed", []), this])


def load_config(folder: Path, own: bool = False, replaced: Iterable[str] = ()) -> DictConfig:
    """The resolved config of a run, with `run_dir` where the folder stands now.

    replaced: keys that the caller puts new values at; a reference to a secret there is left out.

    A folder may come from anybody: what its config may build is checked against `boltlab.config.trust`, except for the
    `own` run of this command, whose config was composed here.

    Raises:
        UserError: no config, one that cannot be read, or one that asks for what is not trusted.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    try:
        text = path.read_text(encoding="utf-8")
        if refers_to_itself(text):
            raise ValueError("it refers to its own parts (*name), which no config of ours does")
        # Both loaders make plain values only. The faster one, of what nobody else wrote: it fails on what is too deep.
        config = OmegaConf.create(yaml.load(text, PlainLoader) if own else text)
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}"[:500]) from e
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"{path} holds no config")
    config.pop("steps_per_execution", None)  # of older versions: several steps at a time, equal to single ones
    credentials.forget_references(config, replaced)
    if not own:
        from boltlab.config.trust import refuse_untrusted

        refuse_untrusted(config, path)
    config.run_dir = str(folder.resolve())
    return config


def refers_to_itself(text: str) -> bool:
    """Whether a YAML text has an alias, `*name`."""
    return bool(_ALIAS.search(text)) and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))


def write_summary(folder: Path, **values: Any) -> dict[str, Any]:
    """Adds values to `summary.json`, whole or not at all."""
    summary = {**read_summary(folder), **values}
    write_json(folder / "summary.json", summary)
    return summary


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    beside = path.with_name(f".{path.stem}-{secrets.token_hex(3)}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def end(folder: Path, **values: Any) -> dict[str, Any]:
    """Writes how a run ended, with the time that it took."""
    ended, summary = time.time(), read_summary(folder)
    before = summary.get("resumed")  # the time between does not count
    began = before[-1]["time"] - before[-1]["seconds"] if before else summary.get("started", ended)
    return write_summary(folder, ended=ended, seconds=round(ended - began, 2), **values)


def reason(error: BaseException) -> str:
    """The first line of what an error says; of the mistakes of a config, all of them."""
    mistakes = [f"{m.where}: {m.message}" for m in getattr(error, "mistakes", [])]
    text = "; ".join(mistakes) or getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
    return credentials.masked(str(text).splitlines()[0][:500])


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Writes into the summary that what runs inside was interrupted, or failed and why; the error goes on.

    Where the summary itself cannot be written, on a full disk, the error that ended the run is the one to tell of.
    """
    try:
        yield
    except Stopped as e:
        with suppress(OSError):
            end(folder, status="interrupted", reason=str(e))
        raise
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
        with suppress(OSError):
            end(folder, status="interrupted")
        raise KeyboardInterrupt from None
    except BaseException as e:
        with suppress(OSError):
            end(folder, status="failed", reason=reason(e), error=type(e).__name__)
        raise


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


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json`, or nothing where there is none or it is broken."""
    return sound(read_json(folder / "summary.json"))


def sound(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary, which may come from anybody, without what is not of the kind that is read by its key."""
    return {key: value for key, value in summary.items() if _sound(key, value)}


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON, or nothing where there is none or it is broken."""
    try:
        content = json.loads(path.read_bytes() if path.is_file() else "")  # a device or a pipe may have no end
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _sound(key: str, value: Any) -> bool:
    if key in ("started", "ended", "seconds", "fit_seconds", "samples_per_second", "data_wait_share"):
        return _number(value)
    if key in ("best", "final", "test"):
        return isinstance(value, dict) and all(map(_number, value.values()))
    if key in ("pid", "epochs", "steps", "skipped_steps", "processes"):
        return isinstance(value, int) and abs(value) < 1e15
    if key == "resumed":
        kept = ("time", "seconds")
        return isinstance(value, list) and all(
            isinstance(r, dict) and all(_number(r.get(k)) for k in kept) for r in value
        )
    return not isinstance(value, str) or value.isprintable()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and (abs(value) < 1e15 or isinstance(value, float))


def started(summary: dict[str, Any]) -> float:
    """When a run began, in seconds since 1970; 0.0 where its summary does not say so."""
    value = summary.get("started")
    return value if isinstance(value, (int, float)) and 0 < value < 1e11 else 0.0


def folders(log_dir: str | Path, verb: str = "train") -> Iterator[Path]:
    """All run folders of a verb, newest first; the jobs of a sweep stand one folder deeper."""
    top = Path(log_dir) / verb
    found = [config.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for config in top.glob(pattern)]
    yield from sorted(found, key=lambda folder: (started(read_summary(folder)), folder.name), reverse=True)


def refuse_links(folder: Path) -> None:
    """
    Raises:
        UserError: something in the folder is a link: whoever sent it could have any file of yours overwritten.
    """
    for path in (folder, *folder.iterdir(), *(folder / "checkpoints").glob("*")):
        if path.is_symlink() and path != folder:
            raise UserError(f"{path} is a link to {path.readlink()}: a run goes on in a folder of its own files only")


def find(run: str, log_dir: str | Path, verb: str = "train", option: str = "run") -> Path:
    """The folder that `run=` means: `latest`, a path, or (part of) the name of a folder under the log folder.

    Raises:
        UserError: nothing fits, or several do.
    """
    if run != "latest":
        path = Path(run)
        try:
            for folder in (path, Path(log_dir) / verb / run):
                if (folder / "config.yaml").is_file():
                    return folder.resolve()
            is_folder = path.is_dir()
        except OSError as e:  # no name that this system can look for
            raise UserError(f"{option}={run[:60]}… cannot be looked for: {e.strerror}") from e
        if is_folder:
            raise UserError(f"{option}={run} is a folder, but no run folder: it has no config.yaml")
    known = list(folders(log_dir, verb))
    if not known:
        raise UserError(
            f"there is no run yet under {Path(log_dir) / verb}: train one with `boltlab train`, or give log_dir=…"
        )
    if run == "latest":
        return known[0].resolve()
    # A job of a sweep may be named with its sweep, as the table does.
    named = {folder: f"{folder.parent.name}/{folder.name}" if "/" in run else folder.name for folder in known}
    fitting = [folder for folder, name in named.items() if run in name]
    if len(fitting) == 1:
        return fitting[0].resolve()
    if fitting:
        names = ", ".join(folder.name for folder in fitting[:5])
        raise UserError(f"{option}={run} fits {len(fitting)} runs ({names}): give more of the name")
    raise UserError(f"{option}={run} is neither a run folder nor part of the name of one under {Path(log_dir) / verb}")


def status(summary: dict[str, Any], folder: Path | None = None, job: str | None = None) -> str:
    """The status of a run; one that says `running` while its process is gone was killed.

    A lock on `folder` that nobody holds proves it; where there is none, the pid counts, which another may have by now.
    `job`: what the cluster says, for a run that was given to one (`boltlab.launchers.slurm.states`).
    """
    state = str(summary.get("status", "unknown"))
    if job in ("queued", "preempted") and state not in ("finished", "failed"):
        return job
    if job == "running" and state in ("queued", "interrupted"):  # its process begins, or ends
        return "running"
    if state == "queued" and job in (None, "gone", "cancelled"):
        here = summary.get("host") in (None, platform.node())
        left = job == "gone" or (job is None and here and not _alive(summary.get("pid")))
        return "cancelled" if job == "cancelled" else "not started" if left else state
    if state != "running" or job == "running":
        return state
    locked = _locked(folder) if folder is not None else None
    if locked is None:
        locked = summary.get("host") not in (None, platform.node()) or _alive(summary.get("pid"))
    return "running" if locked else "killed"


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
    named = {"project": {"package": own.package, "version": own.version}} if own and own.trusted else {}
    return {
        **named,
        "git_commit": git.commit,
        "git_dirty": git.dirty,
        "git_left_out": list(git.left_out),  # of git.patch, because of their names
        "command": [credentials.masked(argument) for argument in sys.argv],
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


def has_file(commit: str, path: str) -> bool:
    """Whether a commit that this clone knows has the file."""
    return bool(re.fullmatch("[0-9a-f]{7,64}", commit)) and _git("cat-file", "-e", f"{commit}:{path}") is not None


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
