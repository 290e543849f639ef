"""What is known of a run whose summary.json a power cut has left empty or in part."""

import functools
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from boltlab.ground.texts import plain

_NAME = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)_(.+)-[a-f][0-9a-f]{5}")  # as `lookup.new_folder` makes it


def known(folder: Path) -> dict[str, Any]:
    """Name and start, from the folder's name, else the time of its `.run`; a run whose process is gone, which resumes.
    A line says so; nothing where the folder holds no run of ours, or there was never a summary."""
    mark = folder / ".run"
    if not mark.is_file() or not (folder / "summary.json").is_file():
        return {}
    _say(folder)
    found: dict[str, Any] = {"status": "running", "started": mark.stat().st_mtime}
    if match := _NAME.fullmatch(folder.name):
        with suppress(ValueError, OSError):
            found |= {"name": match[2], "started": datetime.strptime(match[1], "%Y-%m-%d_%H-%M-%S").timestamp()}
    return found


@functools.cache
def _say(folder: Path) -> None:
    name = plain(str(folder / "summary.json"))
    print(f"{name} is damaged: name and start are those of the folder", file=sys.stderr, flush=True)
