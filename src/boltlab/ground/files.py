"""Files that are written whole or not at all, and small ones of JSON."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_Stamp = tuple[int, int, int]
_known: dict[Path, tuple[_Stamp, bytes]] = {}  # what this process has read or written: it is not opened again
_MOST = 16


def opened(path: str | Path, buffering: int = -1) -> IO[bytes]:
    """A file to read from.

    Raises:
        OSError: there is none, or it is a pipe or a device, which would keep its reader waiting or never end.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | at_once))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "this is a pipe or a device, no file", os.fspath(path))


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most so many bytes; nothing where it has more, is another thing or cannot be read."""
    try:
        if not path.is_file():  # a device or a pipe may have no end
            return b""
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError):
        return b""
    return content if len(content) <= most else b""


def read_json(path: Path, most: int = 30_000_000) -> dict[str, Any]:
    """A file of JSON, or nothing where there is none, or it is broken or too large."""
    try:
        stamp, (known, text) = _stamp(path), _known.get(path, (None, b""))
        if known != stamp:
            text = read_bytes(path, most)
            _remember(path, stamp, text)
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(path: Path, stamp: _Stamp, content: bytes) -> None:
    _known.pop(path, None)
    _known[path] = stamp, content
    while len(_known) > _MOST:
        del _known[next(iter(_known))]


def _stamp(file: Path | int) -> _Stamp:
    about = os.stat(file)
    return about.st_ino, about.st_mtime_ns, about.st_size


def write_json(path: Path, value: Any, sync: bool = False) -> None:
    """Writes a file of JSON, whole or not at all; sync: see `whole`."""
    # Names of files that are no UTF-8 become escapes, which JSON reads back to the same names.
    content = json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace")
    with whole(path, sync) as file:
        file.write(content)
        file.flush()
        stamp = _stamp(file.fileno())  # not of what another process writes in its place
    _remember(path, stamp, content)


def write_whole(path: Path, text: str, sync: bool = False) -> None:
    """Writes a file of text, whole or not at all; sync: see `whole`."""
    with whole(path, sync) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextmanager
def whole(path: Path, sync: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to that stands at `path` when it is complete; after an error nothing of it is left.

    sync: it stands there when all of it is on the disk.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    if sync:  # the rename itself is on the disk only when the folder is
        with suppress(OSError):  # not every system can say so
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
