"""Small files that are read and written whole: JSON and text."""

import json
import secrets
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON, or nothing where there is none or it is broken."""
    try:
        content = json.loads(path.read_bytes() if path.is_file() else "")  # a device or a pipe may have no end
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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
