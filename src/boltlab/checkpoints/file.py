"""One checkpoint as a file: writing it whole, verifying it, reading it, and what is in one that is refused.

A checkpoint holds tensors and plain Python values only, so it always loads with `weights_only=True`. It is written
beside its target, synced to the disk and renamed, so that a reader sees the old file or the new one, never a part.
A checkpoint is a zip archive; the archive's comment carries the SHA-256 of all that stands before it, so that one file
proves itself (`unzip -z last.ckpt` shows it, and torch.load and every unzip read it as before).
"""

import hashlib
import os
import pickle
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from boltlab.ground import files
from boltlab.ground.errors import UserError

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_COMMENT_LENGTH = struct.pack("<H", _COMMENT_BYTES)  # stands right before the comment
_CHUNK = 1 << 20
MOST_UNPACKED = 100  # times the size of a file
# What a writer that was killed leaves: see `files.whole`, its name in older versions, and `loggers.csv`.
_LEFTOVER = re.compile(
    r"\.(.+\.(ckpt|json|yaml)|trial)\.[0-9a-f]{8}|\.(summary|config|jobs|data)-[0-9a-f]{6}|metrics\.csv\.new"
)


class CheckpointError(UserError):
    """A checkpoint is missing, broken or not what it should be; the message names the file."""


# ---------------------------------------------------------------- writing


def write(content: dict[str, Any], path: Path) -> None:
    """Writes plain content and its hash beside `path`, syncs it to the disk and renames it; no copy is held in memory.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, … What stood at `path` is as it was.
    """
    content = plain(content)
    with whole(path) as file:
        hashing = _Hashing(file)
        torch.save(content, cast(IO[bytes], hashing))
        file.seek(-2, os.SEEK_END)  # the last two bytes of a zip archive are the length of its comment
        file.write(_COMMENT_LENGTH + _MARK + hashing.hash.hexdigest().encode())


class _Hashing:
    """A file that torch.save writes to from the first byte to the last, without ever seeking."""

    def __init__(self, file: IO[bytes]):
        self.hash = hashlib.sha256()
        self._file = file

    def write(self, part: Any) -> int:
        self.hash.update(part)
        return self._file.write(part)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that stands at `path` when all of it is on the disk; after an error nothing of it is left.

    Raises:
        CheckpointError: the system refused.
    """
    with _refusal(f"cannot write {path}", "; what stood there is untouched"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path, sync=True) as file:
            yield file


@contextmanager
def _refusal(what: str, more: str = "") -> Iterator[None]:
    """Says with `what` that the system refused, also where torch hides its error behind a RuntimeError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        if refused := _system_error(e):
            raise CheckpointError(f"{what}: {refused.strerror}{more}") from e
        raise


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError that stands behind an error, if one does."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def check_folder(folder: Path, needed_bytes: int) -> None:
    """Tries a file in the folder that checkpoints will go to, before hours of training end without one.

    Raises:
        CheckpointError: the folder cannot be made or written, or the disk has less than `needed_bytes` left.
    """
    trial = folder / f".trial.{secrets.token_hex(4)}"
    what = f"checkpoints cannot be written to {folder}"
    with _refusal(what):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"\0")
        finally:
            trial.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        needed = f"one takes {megabytes(needed_bytes)} or more: make room, or choose another disk with log_dir=…"
        raise CheckpointError(f"{what}: {megabytes(free)} are free there, {needed}")


def clean_leftovers(folder: Path) -> list[Path]:
    """Removes what killed writers left in a run folder and its checkpoints; returns what it removed."""
    left = [
        path
        for place in (folder, folder / "checkpoints")
        for path in (place.iterdir() if place.is_dir() else ())
        if _LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def megabytes(count: int) -> str:
    """1234567 → "1.2 MB"."""
    return f"{count / 1e6:,.1f} MB"


def plain(value: Any) -> Any:
    """The value with numpy scalars, paths and subclasses of containers made plain.

    Raises:
        CheckpointError: something in it is no tensor and no plain value; the message says where.
    """
    return _plain(value, "checkpoint")


_KEPT = (torch.Tensor, torch.dtype, torch.device, type(None))
_MADE_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    *((np.generic, lambda value: value.item()), (np.ndarray, torch.from_numpy), (Path, str)),
    *((bool, bool), (int, int), (float, float), (str, str)),  # an IntEnum, a str subclass
)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, _KEPT) or type(value) in (bool, int, float, str, bytes, complex):
        return value
    if isinstance(value, dict):
        return {_plain(k, where): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(v, f"{where}.{i}") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, set):
        return {_plain(v, where) for v in value}
    for kind, convert in _MADE_PLAIN:
        if isinstance(value, kind):
            return convert(value)
    raise CheckpointError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


# ---------------------------------------------------------------- reading


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint that this module wrote.

    Raises:
        CheckpointError: no such file, cut short, changed, or holding more than tensors and plain values.
    """
    with _refusal(f"cannot read the checkpoint {path}"), files.opened(path) as file:
        if problem := _problem(file):
            raise CheckpointError(f"the checkpoint {path} {problem}{_foreign(file, path)}")
        content = _load_plain(file, path, map_location)  # of the file that was hashed, whatever stands there by now
    if problem := _shape_problem(content):
        raise CheckpointError(f"the checkpoint {path} {problem}")
    return content


def _shape_problem(content: Any) -> str | None:
    """A file with a right hash may still come from anybody."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return "holds no state_dict"
    if not all(isinstance(key, str) for key in content["state_dict"]):
        return "has a state_dict whose names are no texts"
    for key in ("config", "callbacks", "loops", "exact"):
        if not isinstance(content.get(key), dict | None):
            return f"has a {key} that is a {type(content[key]).__name__}"
    config = content.get("config") or {}
    parts = ("data", "model", "trainer", "optimizer")
    if wrong := [part for part in parts if not isinstance(config.get(part), dict | None)]:
        return f"has a config whose {wrong[0]} is a {type(config[wrong[0]]).__name__}"
    return None


def _marked(file: IO[bytes]) -> bool:
    """Whether a file ends as ours do."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _COMMENT_BYTES))
    return file.read().startswith(_MARK)


def read_foreign(path: Path) -> Any:
    """What torch.save has written to a file of any program, with no hash to hold it against.

    Raises:
        CheckpointError: no such file, no such format, or one that holds more than tensors and plain values; the
            message says what it would import, and nothing of it was run.
    """
    with _refusal(f"cannot read the checkpoint {path}"), files.opened(path) as file:
        if _marked(file) and (problem := _problem(file)):
            raise CheckpointError(f"{path} {problem}")
        return _load_plain(file, path, "cpu")


def _load_plain(file: IO[bytes], path: Path, map_location: Any) -> Any:
    if bomb := _bomb(file):
        raise CheckpointError(f"{path} {bomb}")
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as e:  # also of a file that was made to be odd, and of a device that is not there
        if _system_error(e):
            raise
        why = f"cannot be loaded: {type(e).__name__}: {e}".splitlines()[0]
        if isinstance(e, pickle.UnpicklingError):
            why = "holds more than tensors and plain values, or is nothing that torch.save has written: refused"
        raise CheckpointError(f"{path} {why}{_foreign(file, path)}") from e


def _bomb(file: IO[bytes]) -> str:
    """What is wrong with an archive that would fill the memory; torch.save packs without compressing."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except Exception:  # no archive, or one that was made to be odd: torch says so
        return ""
    large = size > MOST_UNPACKED * file.seek(0, os.SEEK_END)
    return f"unpacks to {megabytes(size)}, as nothing does that torch.save writes" if large else ""


def verify(path: Path) -> str | None:
    """Says what is wrong with a checkpoint file; None where its content and its hash agree. Runs nothing from it."""
    try:
        with files.opened(path) as file:
            return _problem(file)
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _problem(file: IO[bytes]) -> str | None:
    """What is wrong with the bytes of a checkpoint; read in parts, so that they never stand in memory as a whole."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return "is empty"
    file.seek(0)
    start = file.read(2)
    left = max(0, end - _COMMENT_BYTES - 2)
    file.seek(left)
    length, comment = file.read(2), file.read()
    if start != b"PK" or not comment.startswith(_MARK):
        return "is cut short, or was not written by boltlab: it carries no hash"
    file.seek(0)
    hashed = hashlib.sha256()
    while part := file.read(min(_CHUNK, left)):
        hashed.update(part)
        left -= len(part)
    hashed.update(b"\0\0")  # the length of the comment, before there was one
    if length != _COMMENT_LENGTH or hashed.hexdigest().encode() != comment[len(_MARK) :]:
        return "is damaged: its content does not fit its hash"
    return None


def _foreign(file: IO[bytes], path: Path) -> str:
    """What a file that is refused would import, and how a person who trusts it takes its weights over."""
    if path.suffix == ".safetensors":
        return ". It is called a safetensors file: init_from= takes it as it is"
    if bomb := _bomb(file):
        return f". It {bomb}"
    from boltlab.checkpoints.pickles import imports

    convert = f"boltlab checkpoint convert {path} output=plain.ckpt"
    if names := imports(file):
        shown = ", ".join(names[:8]) + ", …" * (len(names) > 8)
        trust = f"Only if you trust whoever made it: {convert} trust=true"
        return f". It would import {shown}; nothing of it was run. {trust}"
    return f". If another program wrote it: {convert}" if zipfile.is_zipfile(file) and not _marked(file) else ""
