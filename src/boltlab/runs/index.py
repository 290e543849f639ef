"""All runs as rows, fast: what their summaries and configs say, from an index in the log folder.

<log_dir>/.index-<verb>.json    a cache only: made anew where it is missing, broken, of another version or out of date

The index knows a file by the time of its last change and its size. Configs of one team repeat each other: each value is
kept once, in a table that the runs point into, and a row makes a dict of them only when it is asked for one.
Run folders may come from anybody: what is read of them is bounded, and made of plain values.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from boltlab import runs
from boltlab.config.effects import NO_EFFECT, under

MARKS = "marks.json"  # tags and note given afterwards: the summary of a run at work is the run's own to write
_VERSION = 2
_CONFIG, _SUMMARY = "config.yaml", "summary.json"
_LARGEST = {_CONFIG: 1_000_000, _SUMMARY: 1_000_000, MARKS: 100_000}  # what has more bytes is not read
_PLAIN = {str, int, float, bool, list, type(None)}
_BLOCK = re.compile(r"\n(?=[A-Za-z_])")
_MOST_KEYS, _LONGEST_KEY, _LONGEST_TEXT, _DEEPEST = 3000, 200, 20_000, 30
_UNSETTLED = (*runs.AT_WORK, "interrupted")  # a lock, a process or the cluster may say something else
_NOT_OF_RECIPE = under("seed", "data.seed", *NO_EFFECT)  # two runs are one where nothing else in their configs differs
# Stamps of its files, status, start, recipe, number of the config's layout, what differs from its base, values as JSON.
_Entry = tuple[str, str, float, str, int, list[int], str]


@dataclass
class _Layout:
    """The keys that several configs have, and the values of one of them: another config is what differs from those."""

    keys: dict[str, int]  # → place in base
    base: list[int]  # → place in the index's table


@dataclass(eq=False)
class Row:
    """One run: `row.get("best_val_acc")`, `row.get("optimizer.lr")`, or all as the dicts `values` and `config`.

    run: the folder's name below <log_dir>/<verb> (`top`), a job's with that of its sweep.
    recipe: the same for all runs whose configs are equal but for seed, data.seed, name, tags, logger and places.
    """

    top: Path
    run: str
    status: str
    started: float
    recipe: str
    _text: str = field(repr=False)
    _layout: _Layout = field(repr=False)
    _changes: list[int] = field(repr=False)  # place in the layout's base, place in the table, and so on
    _table: list[Any] = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.top / self.run

    @cached_property
    def values(self) -> dict[str, Any]:
        """run, status, name, data, model, started, ended, seconds, epochs, steps, samples_per_second and what else the
        summary says in one piece; metrics as best_<metric>, final_<metric>, test_<metric> (an evaluation's begin with
        its split); tags and note."""
        own = {"run": self.run, "status": self.status}
        return {**own, **_parsed(self._text), **own}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Full dotted path → a plain value or a list of them."""
        places = list(self._layout.base)
        for at, place in zip(self._changes[::2], self._changes[1::2], strict=True):
            places[at] = place
        return {key: self._table[places[at]] for key, at in self._layout.keys.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """What the run says by a key; where both have it, its summary's word."""
        at = self._layout.keys.get(key)
        if at is None or ("." not in key and key in self.values):  # a path is the config's: nothing else need be read
            return self.values.get(key, default)
        changed = self._changes[::2]
        return self._table[self._changes[2 * changed.index(at) + 1] if at in changed else self._layout.base[at]]

    def __contains__(self, key: str) -> bool:
        return key in self._layout.keys or key in self.values


def rows(log_dir: str | Path, verb: str = "train") -> list[Row]:
    """All runs of a verb, newest first. A log folder that is missing or cannot be written is no error."""
    top, file = Path(log_dir) / verb, Path(log_dir) / f".index-{verb}.json"
    index = _Index.read(file)
    before, index.runs = index.runs, {}
    changed, unsettled = False, []
    for name, stamps in _found(str(top)):
        entry = before.get(name)
        if entry is None or entry[0] != stamps or entry[1] in runs.AT_WORK:
            entry = index.entry(f"{top}{os.sep}{name}", stamps, known := entry)
            # The summary of a run at work is read again next time anyway.
            changed |= known is None or list(known[3:6]) != list(entry[3:6]) or entry[1] not in runs.AT_WORK
        if entry[1] in _UNSETTLED:
            unsettled.append(name)
        index.runs[name] = entry
    if changed or before.keys() - index.runs.keys():
        index.write(file)
    found = {name: index.row(top, name) for name in index.runs}
    _settle([found[name] for name in unsettled])
    return sorted(found.values(), key=lambda row: (row.started, row.run), reverse=True)


def read(folder: Path) -> Row:
    """One run as a row, wherever it stands; `run` is the folder's name."""
    index = _Index()
    index.runs[folder.name] = index.entry(str(folder), _stamps(f"{folder}{os.sep}"), None)
    row = index.row(folder.parent, folder.name)
    if row.status in _UNSETTLED:
        _settle([row])
    return row


def _found(top: str) -> Iterator[tuple[str, str]]:
    """The run folders of a verb, as names below its folder, each with the stamps of its files.

    The jobs of a sweep stand one folder deeper.
    """
    for name in _folders_in(top):
        if stamps := _stamps(f"{top}{os.sep}{name}{os.sep}"):
            yield name, stamps
            continue
        for job in _folders_in(f"{top}{os.sep}{name}"):
            if stamps := _stamps(f"{top}{os.sep}{name}{os.sep}{job}{os.sep}"):
                yield f"{name}{os.sep}{job}", stamps


def _stamps(folder: str) -> str:
    """Time of the last change and size of each of a run's files that are read; empty without a config."""
    found = ""
    for name in _LARGEST:
        try:
            about = os.stat(folder + name)
        except (OSError, ValueError):
            found += "-"
        else:
            found += f"{about.st_mtime_ns} {about.st_size}," if stat.S_ISREG(about.st_mode) else "-"
        if found == "-":
            return ""
    return found


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _settle(unsettled: list[Row]) -> None:
    """Asks for each run that is not at its end, in place: is its process alive, its job in the cluster's queue?"""
    folders = [row.folder for row in unsettled]
    jobs = runs.job_states(folders)
    for row in unsettled:
        row.status = runs.status(row.values, row.folder, jobs.get(row.folder))
        row.values["status"] = row.status


@dataclass
class _Index:
    """The index in memory."""

    layouts: list[_Layout] = field(default_factory=list)
    table: list[Any] = field(default_factory=list)
    runs: dict[str, _Entry] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)  # a value as JSON → its place in the table
    _numbers: dict[tuple[str, ...], int] = field(default_factory=dict)  # keys → number of their layout
    # text → part of a recipe, key → place
    _blocks: dict[str, tuple[bytes, dict[str, int]]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "_Index":
        """What the file says, or nothing where it says that in a way that is not ours."""
        try:
            content = json.loads(file.read_bytes() if file.is_file() else "")
            version, layouts, table, entries = (content[key] for key in ("version", "layouts", "table", "runs"))
            known = [_Layout({str(key): at for at, key in enumerate(keys)}, base) for keys, base in layouts]
            index = cls(known, table, entries)
            return index if version == _VERSION and index._fits() else cls()
        except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            return cls()

    def _fits(self) -> bool:
        """Whether this is an index as `write` writes it."""
        last, sizes = len(self.table), [len(layout.keys) for layout in self.layouts]
        fits = set(map(type, self.table)) <= _PLAIN
        for layout in self.layouts:
            fits &= len(layout.base) == len(layout.keys) and set(map(type, layout.base)) <= {int}
            fits &= all(0 <= place < last for place in layout.base)
        return fits and all(_is_entry(entry, sizes, last) for entry in self.runs.values())

    def write(self, file: Path) -> None:
        """Writes the file, whole or not at all; where it cannot be written, the next call works without."""
        used = {place for entry in self.runs.values() for place in entry[5][1::2]}
        used.update(place for layout in self.layouts for place in layout.base)
        layouts = [[list(layout.keys), layout.base] for layout in self.layouts]
        content = {"version": _VERSION, "layouts": layouts, "table": self.table, "runs": self.runs}
        with suppress(OSError):
            if len(self.table) > 2 * len(used) + 1000:  # most is of runs that are gone: the next call begins anew
                file.unlink(missing_ok=True)
            else:
                runs.write_whole(file, json.dumps(content, separators=(",", ":")))

    def row(self, top: Path, name: str) -> Row:
        _, status, started, recipe, number, changes, text = self.runs[name]
        return Row(
            top, name.replace(os.sep, "/"), status, started, recipe, text, self.layouts[number], changes, self.table
        )

    def entry(self, folder: str, stamps: str, before: _Entry | None) -> _Entry:
        """Reads a run's files; `before` is what was known of it, of which a config that has not changed is kept."""
        if before is not None and before[0].partition(",")[0] == stamps.partition(",")[0]:
            config = before[3:6]
        else:
            config = self._config(_text(folder, _CONFIG))
        values = _values(_parsed(_text(folder, _SUMMARY))) | _marks(_parsed(_text(folder, MARKS)))
        status, started = str(values.get("status", "unknown")), float(runs.started(values))
        return stamps, status, started, *config, json.dumps(values, separators=(",", ":"))

    def _config(self, text: str) -> tuple[str, int, list[int]]:
        """A config's recipe, layout, and what differs from that.

        Its blocks (`data:`, `model:`, …) are read one by one, for most of them stand in other runs word by word.
        """
        digests, found = set[bytes](), dict[str, int]()
        blocks = _BLOCK.split(text)
        try:
            for block in blocks if all(block[:1].isidentifier() for block in blocks) else [text]:
                if block not in self._blocks:
                    self._blocks[block] = self._block(block)
                digests.add(self._blocks[block][0])
                found.update(self._blocks[block][1])
        except (ValueError, RecursionError, yaml.YAMLError):
            digests, found = {text.encode()}, {}
        recipe = hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
        keys = tuple(sorted(found)[:_MOST_KEYS])
        places = [found[key] for key in keys]
        if not self._numbers:
            self._numbers = {tuple(layout.keys): number for number, layout in enumerate(self.layouts)}
        if keys not in self._numbers:
            self._numbers[keys] = len(self.layouts)
            self.layouts.append(_Layout({key: at for at, key in enumerate(keys)}, places))
        number = self._numbers[keys]
        differing = enumerate(zip(places, self.layouts[number].base, strict=True))
        return recipe, number, [part for at, (place, base) in differing if place != base for part in (at, place)]

    def _block(self, text: str) -> tuple[bytes, dict[str, int]]:
        content = _load(text)
        found = {key: json.dumps(value) for key, value in _flat(content if isinstance(content, dict) else {}, "", 0)}
        of_recipe = sorted(f"{key}={value}" for key, value in found.items() if not _NOT_OF_RECIPE.match(key))
        digest = hashlib.sha256("\n".join(of_recipe).encode()).digest() if of_recipe else b""
        return digest, {key: self._placed(value) for key, value in found.items()}

    def _placed(self, text: str) -> int:
        if not self._places:
            self._places = {json.dumps(known): place for place, known in enumerate(self.table)}
        if text not in self._places:
            self._places[text] = len(self.table)
            self.table.append(json.loads(text))
        return self._places[text]


def _is_entry(entry: _Entry, sizes: list[int], last: int) -> bool:
    """sizes: of each layout, its number of keys. last: length of the table."""
    stamps, status, started, recipe, number, changes, text = entry
    kinds = (type(stamps), type(status), type(started), type(recipe), type(text), type(number))
    fits = kinds == (str, str, float, str, str, int) and 0 <= started < 1e11 and 0 <= number < len(sizes)
    fits &= set(map(type, changes)) <= {int} and len(changes) % 2 == 0
    if changes and fits:
        at, to = changes[::2], changes[1::2]
        fits = 0 <= min(at) <= max(at) < sizes[number] and 0 <= min(to) <= max(to) < last
    return fits


def _load(text: str) -> Any:
    """
    Raises:
        ValueError, yaml.YAMLError: no YAML, or one that no config of ours is.
    """
    if runs.refers_to_itself(text):
        raise ValueError("it refers to its own parts")
    # libyaml's loader goes as deep as the text does, until the stack of the process ends. A block's depth is bounded by
    # the length of a line.
    if text.count("[") + text.count("{") > 500 or max(map(len, text.split("\n"))) > 2000:
        return yaml.load(text, yaml.SafeLoader)
    return yaml.load(text, runs.PlainLoader)


def _text(folder: str, name: str) -> str:
    """What a file says; nothing where it is too large or cannot be read."""
    path = os.path.join(folder, name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for who writes into it
            return ""
        with open(path, "rb") as file:
            content = file.read(_LARGEST[name] + 1)
        return content.decode() if len(content) <= _LARGEST[name] else ""
    except (OSError, ValueError):
        return ""


def _parsed(text: str) -> dict[str, Any]:
    """JSON's dict, or an empty one where it is no JSON or holds another thing."""
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _values(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary says in one piece: a metric is best_…, final_… or test_…."""
    found: dict[str, Any] = {}
    for key, value in runs.sound(summary).items():
        if key in ("best", "final", "test"):
            for metric, number in value.items():
                named = key == "test" and metric.startswith(("test_", "val_", "train_"))
                found[metric if named else f"{key}_{metric}"] = _plain(number)
        elif type(value) in _PLAIN - {list} and key not in ("run", "tags", "note"):
            found[key] = _plain(value)
    return {key: found[key] for key in list(found)[:_MOST_KEYS] if key.isprintable() and len(key) <= _LONGEST_KEY}


def _marks(marks: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(marks.get("tags"), list):
        found["tags"] = [_plain(tag) for tag in marks["tags"] if isinstance(tag, str)]
    if isinstance(marks.get("note"), str):
        found["note"] = _plain(marks["note"])
    return found


def _flat(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Dotted path and plain value of each leaf; a list is one, unless there are dicts in it."""
    within: Any = ()
    if isinstance(value, dict):
        within = value.items()
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        within = enumerate(value)
    if not within or depth == _DEEPEST:
        if path:  # not of an empty config
            yield path, _plain(value)
        return
    for key, part in within:
        name = f"{path}.{key}" if path else str(key)
        if len(name) <= _LONGEST_KEY and name.isprintable():
            yield from _flat(part, name, depth + 1)


def _plain(value: Any) -> Any:
    """A value as JSON has it, of bounded size; a text without what a terminal or a file would stumble over."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, list):
        value = [_plain(part) for part in value]
        if len(text := json.dumps(value)) <= _LONGEST_TEXT:
            return value
    else:
        text = str(value)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    if len(text) <= _LONGEST_TEXT:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[:100]}… ({len(text)} characters, SHA-256 {digest})"
