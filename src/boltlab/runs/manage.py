"""The actions of `boltlab runs`: rm, archive, tag, note.

rm and archive take a run or a whole sweep, only in the log folder and only if nothing of it is running. They rename the
folder first, so that nobody finds half of it.
"""

import hashlib
import os
import secrets
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.ground.texts import line
from boltlab.loggers.place import place
from boltlab.runs import differences
from boltlab.runs import index as history
from boltlab.runs.filters import is_filter, select

_ARCHIVE = "archive"  # <log_dir>/archive/<verb>/<run>.tar.gz


# ---------------------------------------------------------------- which folders


def _wanted(words: list[str], action: str) -> None:
    if not words:
        raise ConfigError([Mistake("run", f"is missing: boltlab runs {action}")])


def _folder(word: str, options: Any) -> Path:
    """The folder of a run or of a whole sweep: latest, a path, or (part of) a name under the log folder."""
    top = Path(options.log_dir) / options.verb
    for path in (top / word, Path(word)) if word not in ("", "latest") else ():
        if path.is_symlink() or path.exists():
            return path
    if word != "latest" and word and top.is_dir():
        sweeps = [path for path in top.iterdir() if word in path.name and _is_sweep(path)]
        if len(sweeps) == 1 and not any(word in folder.name for folder in runs.folders(options.log_dir, options.verb)):
            return sweeps[0]
    return runs.find(word, options.log_dir, options.verb)


def _named(words: list[str], options: Any) -> list[str]:
    """The words, and in place of the filters among them (`status=failed`) the folders of the runs that pass all."""
    top = Path(options.log_dir) / options.verb
    filters = [w for w in words if is_filter(w) and not Path(w).exists() and not (top / w).exists()]
    if not filters:
        return words
    everything = history.rows(options.log_dir, options.verb)
    chosen = select(everything, filters)
    if not chosen:
        raise UserError(f"none of the {len(everything)} runs under {top} passes {' '.join(filters)}")
    return [word for word in words if word not in filters] + [str(row.folder) for row in chosen]


def _is_sweep(folder: Path) -> bool:
    return (folder / "jobs.json").is_file() or (folder / "sweep.json").is_file()  # train -m, sweep


def _runs_in(folder: Path) -> list[Path]:
    """A run itself, or the jobs of a sweep."""
    if (folder / "config.yaml").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/config.yaml") if not path.parent.is_symlink())


def _to_go(words: list[str], options: Any, done: str) -> dict[Path, list[Path]]:
    """The folders that rm or archive may take away, each with the runs that are in it."""
    problems, found = [], dict[Path, list[Path]]()
    logs = Path(options.log_dir).resolve()
    for word in _named(words, options):
        folder = _folder(word, options)
        if folder.is_symlink():
            problems.append(f"{word} is a link to {folder.readlink()}: only run folders themselves are {done}")
            continue
        folder = folder.resolve()
        depth = len(folder.relative_to(logs).parts) if folder.is_relative_to(logs) else 0
        if depth not in (2, 3):
            problems.append(f"{word} is no folder of a run in the log folder {options.log_dir}")
            continue
        inside = _runs_in(folder)
        sweep = not (folder / "config.yaml").is_file()
        if not inside or (sweep and (depth != 2 or not _is_sweep(folder))):
            problems.append(f"{word} is neither a run folder, for it has no config.yaml, nor one of a sweep")
            continue
        busy = [row for row in map(history.read, inside) if runs.Status(row.status).at_work]
        problems += [f"{runs.shown(row.folder)} is {row.status}: let it end first" for row in busy]
        found[folder] = inside
    if problems:
        raise UserError("; ".join(problems) + f". Nothing was {done}")
    # A job of a sweep that goes as a whole goes with it.
    return {folder: inside for folder, inside in found.items() if folder.parent not in found}


def _held(folders: list[Path]) -> None:
    """Raises UserError where another process holds one of the folders."""
    from filelock import FileLock, Timeout

    for folder in folders:
        with runs.lock(folder):
            pass
        for claim in (folder / "claims").glob("*"):  # of `boltlab sweep`: its workers may be between two trials
            try:
                FileLock(claim).acquire(timeout=0).lock.release()
            except Timeout:
                raise UserError(f"{runs.shown(folder)} is at work: let the sweep end first") from None


def _take_away(folder: Path, logs: Path) -> None:
    """Removes a folder; what it was called is free at once, whatever becomes of the rest."""
    gone = logs / f".removed-{secrets.token_hex(4)}"
    try:
        folder.rename(gone)
    except OSError as e:
        raise UserError(f"{runs.shown(folder)} cannot be removed: {e.strerror}") from e
    try:
        shutil.rmtree(gone)
    except OSError as e:
        raise UserError(f"what is left of {runs.shown(folder)} in {gone} cannot be removed: {e.strerror}") from e


@contextmanager
def _alone(logs: Path) -> Iterator[None]:
    """Of several commands that take runs away, one at a time; what one that was killed has left goes."""
    from filelock import FileLock

    try:
        lock = FileLock(logs / ".removing").acquire()
    except OSError as e:
        raise UserError(f"cannot write into {runs.shown(logs)}: {e.strerror}") from e
    with lock:
        for path in logs.glob(".removed-????????"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (logs / _ARCHIVE).rglob(".*.tar.gz-??????"):
            path.unlink(missing_ok=True)
        yield


# ---------------------------------------------------------------- rm, archive


def remove(words: list[str], options: Any) -> int:
    """Removes runs for good, after a question."""
    _wanted(words, "rm <run or filter> …")
    found = _to_go(words, options, "removed")
    count = sum(map(len, found.values()))
    for folder, inside in found.items():
        print(f"{runs.shown(folder)}" + f"  ({len(inside)} runs)" * (inside != [folder]))
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError([Mistake("yes", f"is false: yes=true removes {_counted(count)} for good")])
        print(f"remove {_counted(count)} for good? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    logs = Path(options.log_dir).resolve()
    with _alone(logs):
        for folder, inside in found.items():
            _held([folder, *inside])
            _take_away(folder, logs)
    print(f"removed {_counted(count)}")
    return 0


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def archive(words: list[str], options: Any) -> int:
    """Packs runs into <log_dir>/archive; a folder goes only when what was packed has been read back and is the same."""
    _wanted(words, "archive <run or filter> …")
    logs = Path(options.log_dir).resolve()
    found = _to_go(words, options, "archived")
    targets = {folder: logs / _ARCHIVE / f"{folder.relative_to(logs)}.tar.gz" for folder in found}
    for folder, target in targets.items():
        if target.exists():
            raise UserError(f"{runs.shown(target)} is there already: nothing was archived")
        if odd := [path for path in folder.rglob("*") if not (path.is_symlink() or path.is_file() or path.is_dir())]:
            raise UserError(f"{odd[0]} is no file that can be archived: nothing was archived")
    for folder, target in targets.items():
        with _alone(logs):
            _held([folder, *found[folder]])
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _pack(folder, target)
            except (OSError, tarfile.TarError) as e:
                why = getattr(e, "strerror", e)
                raise UserError(f"{runs.shown(folder)} cannot be archived, and stays: {why}") from e
            _take_away(folder, logs)
        size = f"{target.stat().st_size / 1e6:.1f} MB"
        print(f"{runs.shown(target)}  {size}")
        back = ["tar", "-xzf", str(runs.shown(target)), "-C", str(runs.shown(folder.parent))]
        print(f"  to bring it back: {shlex.join(back)}")
    return 0


def _pack(folder: Path, target: Path) -> None:
    """Raises UserError: what was packed is not what is in the folder."""
    beside = target.with_name(f".{target.name}-{secrets.token_hex(3)}")
    try:
        with open(beside, "wb") as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=3) as packed:
                packed.add(folder, arcname=folder.name)
            file.flush()
            os.fsync(file.fileno())
        there = dict(_contents(folder))
        with tarfile.open(beside, "r:gz") as packed:
            kept = dict(_members(packed))
        if kept != there:
            odd = sorted(name for name in {*there, *kept} if there.get(name) != kept.get(name))
            raise UserError(f"{runs.shown(folder)} changed while it was archived ({odd[0]}), and stays")
        beside.rename(target)
    finally:
        beside.unlink(missing_ok=True)


def _contents(folder: Path) -> Iterator[tuple[str, str]]:
    """Name → what it is, of everything in a folder: a link's target, a file's hash."""
    yield folder.name, "folder"
    for path in folder.rglob("*"):
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        if path.is_symlink():
            yield name, f"link {os.readlink(path)}"
        elif path.is_dir():
            yield name, "folder"
        else:
            with open(path, "rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()


def _members(packed: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    for member in packed:
        if member.issym():
            yield member.name, f"link {member.linkname}"
        elif member.isdir():
            yield member.name, "folder"
        else:  # of two names of one file, tar keeps the second as a reference, which extractfile follows
            file: Any = packed.extractfile(member)
            yield member.name, hashlib.file_digest(file, "sha256").hexdigest() if file is not None else "nothing"


# ---------------------------------------------------------------- tag, note


def tag(words: list[str], options: Any) -> int:
    """Adds tags to a run, or to all of a sweep, takes away those with a `-` before them, and prints what is there."""
    _wanted(words, "tag <run> <tag> … -<tag> …")
    name, *tags = words
    added, gone = _changes(tags)
    chosen = [history.read(folder) for folder in _marked(name, options)]
    known = sorted({text for row in chosen for text in _tags(row)})
    if missing := gone.difference(known):
        raise UserError(f"{name} has no tag {min(missing)!r}; tags: {', '.join(known) or 'none'}")
    for row in chosen:
        if tags:
            _mark(row.folder, partial(_retagged, _tags(row), added, gone))
        print(f"{_named_in_table(row.folder)}  {line(', '.join(_tags(history.read(row.folder)))) or 'no tag'}")
    return 0


def _changes(tags: list[str]) -> tuple[list[str], set[str]]:
    """The tags to add, and those to take away."""
    if odd := [text for text in tags if not _is_tag(text)]:
        raise ConfigError([Mistake(text[:80], "is no tag: up to 60 signs, no comma") for text in odd])
    gone = {text[1:] for text in tags if text.startswith("-")}
    return [text for text in tags if not text.startswith("-")], gone


def _is_tag(text: str) -> bool:
    return bool(text.lstrip("-").strip()) and text.isprintable() and len(text) <= 60 and "," not in text


def _tags(row: history.Row) -> list[str]:
    tags = row.get("tags")
    return [str(text) for text in tags] if isinstance(tags, list) else []


def _retagged(before: list[str], added: list[str], gone: set[str], marks: dict[str, Any]) -> dict[str, Any]:
    """`before`: what the run has by its config; once marked, its marks say all."""
    tags = marks.get("tags", before)
    kept = [text for text in tags if isinstance(text, str)] if isinstance(tags, list) else []
    return {"tags": [text for text in dict.fromkeys([*kept, *added]) if text not in gone]}


def note(words: list[str], options: Any) -> int:
    """Writes a note to a run, in place of the one before; '' takes it away, no text prints it."""
    _wanted(words, "note <run> <text>")
    name, *texts = words
    text = " ".join(" ".join(texts).split())
    if len(text) > 2000 or not text.isprintable():
        raise ConfigError([Mistake(line(text, 80), "is no note: up to 2000 printable signs")])
    for folder in _marked(name, options):
        if texts:
            _mark(folder, lambda _: {"note": text})
        kept = history.read(folder).get("note")
        print(f"{_named_in_table(folder)}  {line(kept or '', 2000) or 'no note'}")
    return 0


def _named_in_table(folder: Path) -> str:
    sweep, _ = place(folder)
    return line(f"{sweep}/{folder.name}" if sweep else folder.name)


def _marked(name: str, options: Any) -> list[Path]:
    found = [_runs_in(_folder(word, options)) for word in _named([name], options)]
    if not all(found):
        raise UserError(f"{name} is no run folder: it has no config.yaml")
    return [folder for inside in found for folder in inside]


def _mark(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the marks of a run; of two at once, one after the other."""
    from filelock import FileLock, Timeout

    path = folder / history.MARKS
    try:
        with FileLock(folder / ".marks-lock").acquire(timeout=10):
            marks = runs.read_json(path) if path.is_file() else {}
            runs.write_json(path, {key: value for key, value in {**marks, **change(marks)}.items() if value != ""})
    except Timeout:
        raise UserError(f"{runs.shown(path)} is held by another process") from None
    except OSError as e:
        raise UserError(f"{runs.shown(path)} cannot be written: {e.strerror}") from e


ACTIONS: dict[str, Callable[[list[str], Any], int]] = {
    "diff": differences.diff,
    "rm": remove,
    "archive": archive,
    "tag": tag,
    "note": note,
}
