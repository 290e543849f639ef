"""Where a config from outside may write: into the folder of its run, whatever the class is that writes there."""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from boltlab.config.locate import locate

# What callbacks, loggers and the Trainer write in; in a run of your own that writes elsewhere, add the folder here.
FOLDERS: tuple[str, ...] = ("${run_dir}",)
# What an argument is called that takes a place, and a text that leads out of any folder it is put behind.
_PLACE = re.compile(r"(^|_)(dir|dirpath|path|root|folder|file|location|database|uri)$", re.IGNORECASE)
_LEADS_OUT = re.compile(
    r"[/\\]|~\w*([/\\]|$)|[a-z]:[/\\]|(file|local|sqlite)[\w+]*:|(.*[/\\])?\.\.([/\\]|$)", re.IGNORECASE
)


def outside(config: Any, where: str | Path, given: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """(key path with its value, message) of what would be written outside of the run's folder.

    config: plain, and of trusted classes. where: what it was read from. given: keys, or what is above them, that the
    command line gives again.
    """
    skipped, shared = tuple(f"{key}." for key in given), _shared(config, where)
    texts = [text for key in ("callbacks", "logger", "trainer") for text in _texts(config.get(key), key)]
    found = [(key, text) for key, name, text in texts if _wrong(name, text) and text not in shared]
    for key, text in (*found, *_made_for_data(config.get("data"))):
        if not f"{key}.".startswith(skipped):
            message = "is written to, and lies outside of the run's folder; if this run is your own, give it again"
            yield f"{key}={text}"[:200], message


def _wrong(name: str, text: str) -> bool:
    if any(text == folder or text.startswith(f"{folder}/") for folder in FOLDERS):
        return ".." in Path(text).parts
    return bool(_LEADS_OUT.match(text) or (_PLACE.search(name) and not re.match(r"https?://", text)))


def _texts(node: Any, path: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(key path, name of the argument, value) of each text; one that is given by position has its name too."""
    if isinstance(node, str):
        yield path, name, node
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _texts(value, f"{path}.{i}", name)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "_args_" and isinstance(value, (list, tuple)):
                names = [*inspect.signature(locate(node["_target_"])).parameters]
                for i, argument in enumerate(value):
                    yield from _texts(argument, f"{path}._args_.{i}", names[i] if i < len(names) else "path")
            elif key != "_target_":
                yield from _texts(value, f"{path}.{key}", str(key))


def _shared(config: dict[str, Any], where: str | Path) -> tuple[str, ...]:
    """What the runs of a log folder have in common, where that lies below the working folder or holds this run."""
    logs = config.get("log_dir")
    if not isinstance(logs, str):
        return ()
    run = Path(where).resolve().parent
    holds = run.is_relative_to(logs) and run.relative_to(logs).parts[:1] in (("train",), ("sweep",))
    return (f"sqlite:///{logs}/mlflow.db", f"{logs}/mlflow") if holds or not _LEADS_OUT.match(logs) else ()


def _made_for_data(data: Any) -> Iterator[tuple[str, str]]:
    """What data would make anew elsewhere: a folder for downloads, and one for a cache that is no cache yet."""
    if isinstance(data, dict):
        keys = ("data_dir", "cache_dir") if data.get("cache") == "disk" else ("data_dir",)
        for key, text in ((key, data.get(key)) for key in keys):
            there = isinstance(text, str) and Path(text).is_dir() and (key == "data_dir" or Path(text).name == "cache")
            if isinstance(text, str) and _wrong("", text) and not there:
                yield f"data.{key}", text
