"""Small files that are read and written whole: JSON and text."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

_Stamp = tuple[int, int, int]
_written: dict[Path, tuple[_Stamp, bytes]] = {}  # by this process, the newest ones: they need not be opened again
_MOST = 16


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON, or nothing where there is none or it is broken."""
    try:
        content = json.loads(_read(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> bytes:
    if not path.is_file():  # a device or a pipe may have no end
        return b""
    stamp, content = _written.get(path, (None, b""))
    return content if stamp == _stamp(path) else path.read_bytes()


def _stamp(path: Path) -> _Stamp:
    about = os.stat(path)
    return about.st_ino, about.st_mtime_ns, about.st_size


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    stamp = write_whole(path, text)
    _written.pop(path, None)
    _written[path] = stamp, text.encode()
    while len(_written) > _MOST:
        del _written[next(iter(_written))]


def write_whole(path: Path, text: str) -> _Stamp:
    """Writes a file, whole or not at all; returns what tells it from one that another process writes in its place."""
    beside = path.with_name(f".{path.stem}-{secrets.token_hex(3)}")
    try:
        beside.write_text(text, encoding="utf-8")
        stamp = _stamp(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return stamp
