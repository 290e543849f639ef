"""Run folders: making one, and finding what `run=` means."""

import re
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from boltlab.ground.errors import UserError
from boltlab.ground.files import read_json
from boltlab.runs.record import read_summary


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
    """The folder as it is printed: relative to the current one where it lies inside, and plain, whatever its name."""
    here = Path.cwd()
    near = folder.relative_to(here) if folder.is_relative_to(here) else folder
    if str(near).isprintable():
        return near
    from boltlab.ground.texts import plain

    return Path(plain(str(near)).replace("\n", " "))


def started(summary: dict[str, Any]) -> float:
    """When a run began, in seconds since 1970; 0.0 where its summary does not say so."""
    value = summary.get("started")
    return value if isinstance(value, (int, float)) and 0 < value < 1e11 else 0.0


def folders(log_dir: str | Path, verb: str = "train") -> Iterator[Path]:
    """All run folders of a verb, newest first; the jobs of a sweep stand one folder deeper."""
    top = Path(log_dir) / verb
    found = [config.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for config in top.glob(pattern)]
    yield from sorted(found, key=lambda folder: (started(read_summary(folder)), folder.name), reverse=True)


def newest_sweep(log_dir: Path, name: str, fits: Callable[[dict[str, Any]], bool]) -> Path | None:
    """The folder of the newest sweep whose file of this name holds what `fits`."""
    files = sorted((log_dir / "train").glob(f"*/{name}"), reverse=True)
    return next((path.parent.resolve() for path in files if fits(read_json(path))), None)


def refuse_links(folder: Path) -> None:
    """Raises UserError: something in the folder is a link: whoever sent it could have any file of yours overwritten."""
    for path in (folder, *folder.iterdir(), *(folder / "checkpoints").glob("*")):
        if path.is_symlink() and path != folder:
            raise UserError(f"{path} is a link to {path.readlink()}: a run resumes in a folder of its own files only")


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
