"""All runs as rows, fast: what their summaries and configs say, from an index in the log folder.

<log_dir>/.index-<verb>.json    a cache only: made anew where it is missing, broken, of another version or out of date

The index knows a file by the time of its last change and its size. Configs of one team repeat each other: each of their
blocks (`data:`, `model:`, …) is read and kept once.
Run folders may come from anybody: what is read of them is bounded, and made of plain values.
"""

import hashlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from boltlab import runs
from boltlab.config.effects import NO_EFFECT, under
from boltlab.ground import files
from boltlab.runs import lost_summary

MARKS = "marks.json"  # tags and note given afterwards: the summary of a run at work is the run's own to write
_VERSION = 3
_CONFIG, _SUMMARY = "config.yaml", "summary.json"
_MOST_BYTES = 1_000_000  # of a file; what has more is not read
_BLOCK = re.compile(r"\n(?=[A-Za-z_])")
_MOST_KEYS, _LONGEST_KEY, _LONGEST_TEXT, _DEEPEST = 3000, 200, 20_000, 30
_UNSETTLED = (
    "queued",
    "preempted",
    "running",
    "interrupted",
)  # a lock, a process or the cluster may say something else
_NOT_OF_RECIPE = under("seed", "data.seed", *NO_EFFECT)  # two runs are one where nothing else in their configs differs


class _Block(NamedTuple):
    recipe: str  # hash of what counts for a recipe; empty where nothing does
    values: dict[str, Any]  # full dotted path → a plain value or a list of them


class _Entry(NamedTuple):
    stamps: str  # of the files that were read
    blocks: list[str]  # hashes of their texts
    status: str = "unknown"
    started: float = 0.0
    summary: str = "{}"  # `Row.values` as JSON


@dataclass(eq=False)
class Row:
    """One run: `row.get("best_val_acc")`, `row.get("optimizer.lr")`, or all as the dicts `values` and `config`.

    run: the folder's name below <log_dir>/<verb> (`top`), a job's with that of its sweep.
    """

    top: Path
    run: str
    status: str
    started: float
    _summary: str = field(repr=False)
    blocks: list[_Block] = field(repr=False)  # of its config; runs share them

    @property
    def folder(self) -> Path:
        return self.top / self.run

    @cached_property
    def recipe(self) -> str:
        """The same for all runs whose configs are equal but for seed, data.seed, name, tags, logger and places."""
        return " ".join(sorted({block.recipe for block in self.blocks}))

    @cached_property
    def values(self) -> dict[str, Any]:
        """run, status, name, data, model, started, ended, seconds, epochs, steps, samples_per_second and what else the
        summary says in one piece; metrics as best_<metric>, final_<metric>, test_<metric> (an evaluation's begin with
        its split); tags and note."""
        own = {"run": self.run, "status": self.status}
        return {**own, **json.loads(self._summary), **own}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Full dotted path → a plain value or a list of them."""
        return {key: value for block in self.blocks for key, value in block.values.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """What the run says by a key; where both have it, its summary's word."""
        if "." not in key and key in self.values:  # a path is the config's: nothing else need be read
            return self.values[key]
        for block in reversed(self.blocks):
            if key in block.values:
                return block.values[key]
        return self.values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return any(key in block.values for block in self.blocks) or key in self.values


def config_keys(rows: Iterable[Row]) -> set[str]:
    """The keys of all configs together."""
    blocks = {id(block): block for row in rows for block in row.blocks}
    return {key for block in blocks.values() for key in block.values}


def rows(log_dir: str | Path, verb: str = "train") -> list[Row]:
    """All runs of a verb, newest first. A log folder that is missing or cannot be written is no error."""
    top, file = Path(log_dir) / verb, Path(log_dir) / f".index-{verb}.json"
    index, found, kept = _Index.read(file), [], dict[str, _Entry]()
    for name, stamps in _found(str(top)):
        entry = index.entry(top / name, stamps, index.runs.get(name))
        found.append(index.row(top, name, entry))
        # The summary of a run at work is read again next time anyway, its config where it has changed.
        kept[name] = _Entry(_of_config(stamps), entry.blocks) if runs.Status(entry.status).at_work else entry
    if kept != index.runs:
        index.runs = kept
        index.write(file)
    _settle(found)
    return sorted(found, key=lambda row: (row.started, row.run), reverse=True)


def read(folder: Path) -> Row:
    """One run as a row, wherever it stands; `run` is the folder's name."""
    index = _Index()
    row = index.row(folder.parent, folder.name, index.entry(folder, _stamps(f"{folder}{os.sep}")))
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
    for name in (_CONFIG, _SUMMARY, MARKS):
        try:
            about = os.stat(folder + name)
        except (OSError, ValueError):
            found += "-"
        else:
            found += f"{about.st_mtime_ns} {about.st_size}," if stat.S_ISREG(about.st_mode) else "-"
        if found == "-":
            return ""
    return found


def _of_config(stamps: str) -> str:
    return stamps.partition(",")[0]


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _settle(found: list[Row]) -> None:
    """Asks for each run that is not at its end, in place: is its process alive, its job in the cluster's queue?"""
    unsettled = [row for row in found if row.status in _UNSETTLED]
    jobs = runs.job_states(row.folder for row in unsettled)
    for row in unsettled:
        row.status = runs.status(row.values, row.folder, jobs.get(row.folder))
        row.values["status"] = row.status


@dataclass
class _Index:
    """The index in memory."""

    blocks: dict[str, _Block] = field(default_factory=dict)  # by the hash of its text
    runs: dict[str, _Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "_Index":
        """What the file says, or nothing where it is not whole as `write` has written it."""
        head, _, body = files.read_bytes(file, most=10**9).partition(b"\n")
        if head != _head(body):
            return cls()
        blocks, entries = json.loads(body)
        return cls(
            {name: _Block(*block) for name, block in blocks.items()},
            {name: _Entry(*entry) for name, entry in entries.items()},
        )

    def write(self, file: Path) -> None:
        """Writes the file, whole or not at all; where it cannot be written, the next call works without."""
        used = {name: self.blocks[name] for entry in self.runs.values() for name in entry.blocks}
        body = json.dumps([used, self.runs], separators=(",", ":"))
        with suppress(OSError):
            runs.write_whole(file, f"{_head(body.encode()).decode()}\n{body}")
            for left in file.parent.glob(f".{file.name}.*"):  # of a writer that was killed; one at work does without
                left.unlink()

    def row(self, top: Path, name: str, entry: _Entry) -> Row:
        blocks = [self.blocks[block] for block in entry.blocks]
        return Row(top, name.replace(os.sep, "/"), entry.status, entry.started, entry.summary, blocks)

    def entry(self, folder: Path, stamps: str, known: _Entry | None = None) -> _Entry:
        """What is `known` of a run, and what its files say where they have changed since."""
        if known is not None and known.stamps == stamps:
            return known
        same = known is not None and _of_config(known.stamps) == _of_config(stamps)
        blocks = (
            known.blocks
            if known is not None and same
            else self._config(files.read_bytes(folder / _CONFIG, _MOST_BYTES))
        )
        values = _values(files.read_json(folder / _SUMMARY, _MOST_BYTES) or lost_summary.known(folder))
        values |= _marks(files.read_json(folder / MARKS, _MOST_BYTES))
        status, summary = str(values.get("status", "unknown")), json.dumps(values, separators=(",", ":"))
        return _Entry(stamps, blocks, status, float(runs.started(values)), summary)

    def _config(self, content: bytes) -> list[str]:
        """The blocks of a config, of single lines together; most of them stand in other runs word by word."""
        text = content.decode(errors="replace")
        texts: list[str] = []
        for is_group, same in groupby(_BLOCK.split(text), key=lambda part: "\n" in part):
            parts = list(same)
            texts += parts if is_group else ["\n".join(parts)]
        try:
            names = [self._block(part) for part in (texts if all(t[:1].isidentifier() for t in texts) else [text])]
            if sum(len(self.blocks[name].values) for name in names) > _MOST_KEYS:
                raise ValueError("it has too many keys")
            return names
        except (ValueError, RecursionError, yaml.YAMLError):
            name = _hash(text)
            self.blocks[name] = _Block(name, {})
            return [name]

    def _block(self, text: str) -> str:
        name = _hash(text)
        if name not in self.blocks:
            content = _load(text)
            found = dict(_flat(content if isinstance(content, dict) else {}, "", 0))
            counted = [f"{key}={json.dumps(found[key])}" for key in sorted(found) if not _NOT_OF_RECIPE.match(key)]
            self.blocks[name] = _Block(_hash("\n".join(counted)) if counted else "", found)
        return name


def _head(body: bytes) -> bytes:
    return f"{_VERSION} {zlib.crc32(body)}".encode()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(text: str) -> Any:
    """Raises ValueError, yaml.YAMLError: no YAML, or one that no config of ours is."""
    if runs.refers_to_itself(text):
        raise ValueError("it refers to its own parts")
    # libyaml's loader goes as deep as the text does, until the stack of the process ends. A block's depth is bounded by
    # the length of a line.
    if text.count("[") + text.count("{") > 500 or max(map(len, text.split("\n"))) > 2000:
        return yaml.load(text, yaml.SafeLoader)
    return yaml.load(text, runs.PlainLoader)


def _values(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary says in one piece: a metric is best_…, final_… or test_…."""
    found: dict[str, Any] = {}
    for key, value in runs.sound(summary).items():
        if key in ("best", "final", "test"):
            for metric, number in value.items():
                named = key == "test" and metric.startswith(("test_", "val_", "train_"))
                found[metric if named else f"{key}_{metric}"] = _plain(number)
        elif isinstance(value, str | float | bool | int | None) and key not in ("run", "tags", "note"):
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
    return f"{text[:100]}… ({len(text)} characters, SHA-256 {_hash(text)})"
