"""The data that a run's config names relatively, found where the training found them, from any folder."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.ground.files import read_json

_PATHS = re.compile(r"(.+_)?(path|root|dir|file|folder)")  # keys that hold one


def settle(config: Any, folder: Path) -> None:
    """Puts in place of a relative path of the data what it led to in the training: a file or folder below where that
    was started, or, where run and data were moved together, as far from the run folder as it was. What is at neither
    place stays as it is."""
    if not isinstance(config, DictConfig) or not isinstance(config.get("data"), DictConfig):
        return
    found = [*_relative(config.data), *((config, key) for key in ("data_dir",) if _is_relative(config, key))]
    bases = list(_bases(folder, config.get("log_dir"))) if found else []
    for node, key in found:
        place = next((place for base in bases if os.path.lexists(place := base / node[key])), None)
        if place is not None and os.path.abspath(place) != os.path.abspath(node[key]):
            node[key] = str(place)


def _relative(node: DictConfig) -> Iterator[tuple[DictConfig, str]]:
    for key in map(str, node):
        if isinstance(below := node._get_node(key), DictConfig):
            yield from _relative(below)
        elif _PATHS.fullmatch(key) and _is_relative(node, key):
            yield node, key


def _is_relative(node: DictConfig, key: str) -> bool:
    value = getattr(node._get_node(key), "_value", lambda: None)()
    return isinstance(value, str) and value != "" and not re.match(r"[~/\\$]|\w+:", value)


def _bases(folder: Path, log_dir: Any) -> Iterator[Path]:
    """Where the training was started, and what stands there now, as far as the run folder tells."""
    folder = folder.resolve()
    if isinstance(started := read_json(folder / "environment.json").get("cwd"), str) and started:
        yield Path(started)
    parts = Path(log_dir).parts if isinstance(log_dir, str) else ()
    if parts and not Path(log_dir).is_absolute():
        for top in folder.parents:
            if top.parts[-len(parts) :] == parts:
                yield top.parents[len(parts) - 1]
