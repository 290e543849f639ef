"""Small files that are read and written whole: JSON and text."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

_Stamp = tuple[int, int, int]
_known: dict[Path, tuple[_Stamp, bytes]] = {}  # what this process has read or written: it is not opened again
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
    stamp, (known, content) = _stamp(path), _known.get(path, (None, b""))
    if known != stamp:
        content = path.read_bytes()
        _remember(path, stamp, content)
    return content


def _remember(path: Path, stamp: _Stamp, content: bytes) -> None:
    _known.pop(path, None)
    _known[path] = stamp, content
    while len(_known) > _MOST:
        del _known[next(iter(_known))]


def _stamp(path: Path) -> _Stamp:
    about = os.stat(path)
    return about.st_ino, about.st_mtime_ns, about.st_size


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    _remember(path, write_whole(path, text), text.encode())


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
