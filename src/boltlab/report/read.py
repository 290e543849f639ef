"""What a run folder holds for a reader. It may come from anybody: what is read is bounded, checked and plain.

A file that is missing or not as boltlab writes it is left out; `Evidence.missing` says which and why.
"""

import base64
import csv
import io
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter

from boltlab import runs
from boltlab.ground.texts import line

MAX_BYTES = 30_000_000  # of a file; what has more is not read
MAX_ROWS = 200_000  # of metrics.csv
MAX_CLASSES = 2000
MAX_TEXT = 300  # of a name
MAX_COMMAND = 20_000
MAX_PICTURE = 4_000_000  # pixels
SIDE = 96  # pixels of a picture on the page

Points = list[tuple[float, float, float]]  # epoch (nan where the row has none), step, value
Name = Annotated[str, BeforeValidator(lambda value: line(value, MAX_TEXT))]
Count = Annotated[int, Field(ge=0, lt=10**15)]
StrictCount = Annotated[Count, Field(strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]

# What is raised where a file holds other things than it should.
_WRONG = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, csv.Error)


class Broken(Exception):
    """A file is not as boltlab writes it; the message says in what."""


@dataclass
class Confusion:
    """`matrix[true][predicted]`: numbers of samples."""

    names: list[str]
    matrix: list[list[int]]


class Mistake(BaseModel):
    """A wrong prediction; `picture` is a data address."""

    true: Name
    predicted: Name
    probability: Share
    index: int | None = None
    file: Name | None = None
    picture: str | None = None


class _Mistakes(BaseModel):
    mistakes: StrictCount
    samples: StrictCount
    worst: list[Mistake]
    split: Name = "test"


class Bin(BaseModel):
    """The samples whose probability lies between `low` and `high`; no confidence and no accuracy without samples."""

    low: Share = Field(alias="from")
    high: Share = Field(alias="to")
    samples: StrictCount
    confidence: Share | None = None
    accuracy: Share | None = None


class Calibration(BaseModel):
    """How sure the net was, and how right."""

    bins: list[Bin]
    error: Share | None = Field(default=None, alias="expected_calibration_error")


@dataclass
class Evidence:
    """All that the page shows of a run's folder, beside its summary and its config."""

    curves: dict[str, Points] = field(default_factory=dict)
    confusion: Confusion | None = None
    mistakes: list[Mistake] = field(default_factory=list)
    mistaken: tuple[int, int] | None = None  # mistakes, samples
    calibration: Calibration | None = None
    split: str = "test"
    overrides: list[str] = field(default_factory=list)
    command: str | None = None
    later: list[str] = field(default_factory=list)  # commands that have gone on with it
    commit: str | None = None
    uncommitted: str = ""
    machine: str = ""
    missing: list[str] = field(default_factory=list)


def read(folder: Path, verb: str, latest: dict[str, Any] | None = None, picture_bytes: int = 300_000) -> Evidence:
    """Reads a folder; pictures beyond `picture_bytes` are left out.

    latest: what `run=latest` and the like meant when the command was given, by their keys.
    """
    found = Evidence()
    parts: dict[str, Callable[..., None]] = {
        "metrics.csv": _curves,
        "confusion_matrix.csv": _confusion,
        "calibration.json": _calibration,
        "mistakes.json": partial(_mistakes, picture_bytes=picture_bytes),
        "overrides.yaml": partial(_command, verb=verb, latest=latest or {}),
        "environment.json": _environment,
    }
    for name, part in parts.items():
        try:
            part(found, folder, name)
        except FileNotFoundError:
            found.missing.append(f"{name} is not there")
        except (Broken, OSError, yaml.YAMLError, *_WRONG) as e:
            found.missing.append(f"{name} cannot be read{f': {e}' if isinstance(e, Broken) else ''}")
    for again in runs.read_summary(folder).get("resumed") or []:
        overrides = again.get("overrides") if isinstance(again, dict) else None
        if isinstance(overrides, list) and len(found.later) < 20:
            command = shlex.join(["boltlab", verb, f"resume={runs.shown(folder)}", *map(str, overrides)])
            found.later.append(command if len(command) <= MAX_COMMAND else "a command too long to be shown")
    return found


def plain_file(folder: Path, name: str, most: int = MAX_BYTES) -> Path:
    """A file of the folder itself, of bounded size.

    Raises:
        FileNotFoundError, Broken
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(path)
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise Broken("it is no plain file of this folder")
    if path.stat().st_size > most:
        raise Broken(f"it has more than {most:,} bytes")
    return path


def _text(folder: Path, name: str) -> str:
    return plain_file(folder, name).read_text(encoding="utf-8")


def _json(folder: Path, name: str) -> dict[str, Any]:
    content = json.loads(_text(folder, name))
    if not isinstance(content, dict):
        raise Broken("it holds no object")
    return content


def _curves(found: Evidence, folder: Path, name: str) -> None:
    rows = csv.DictReader(io.StringIO(_text(folder, name)))
    header = rows.fieldnames or ()
    if "step" not in header:
        raise Broken("it has no column 'step'")
    curves: dict[str, Points] = {name: [] for name in header[:300] if name not in ("step", "epoch", "")}
    for row in islice(rows, MAX_ROWS):
        if None in row or None in row.values():  # the last line of a run that was killed
            continue
        step, epoch = _float(row["step"]), _float(row.get("epoch", ""))
        for column, points in curves.items():
            if abs(value := _float(row[column])) < 1e100:  # not so NaN
                points.append((epoch, step, value))
    found.curves = {column: points for column, points in curves.items() if points}


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _confusion(found: Evidence, folder: Path, name: str) -> None:
    header, *rows = list(csv.reader(io.StringIO(_text(folder, name)))) or [[]]
    names = [line(text, MAX_TEXT) for text in header[1:]]
    if not 0 < len(names) <= MAX_CLASSES or len(rows) != len(names):
        raise Broken(f"{len(names)} columns and {len(rows)} rows are no matrix")
    matrix = TypeAdapter(list[list[Count]]).validate_python([row[1:] for row in rows])
    if any(len(row) != len(names) for row in matrix):
        raise Broken("its rows are not of one length")
    found.confusion = Confusion(names, matrix)


def _calibration(found: Evidence, folder: Path, name: str) -> None:
    content = Calibration.model_validate_json(_text(folder, name))
    if any((part.accuracy is None or part.confidence is None) != (not part.samples) for part in content.bins):
        raise Broken("its bins are not as their samples")
    if content.error is not None and len(content.bins) <= 200:
        found.calibration = content


def _mistakes(found: Evidence, folder: Path, name: str, picture_bytes: int) -> None:
    content = _Mistakes.model_validate_json(_text(folder, name))
    left = picture_bytes
    for number, mistake in enumerate(content.worst[:100], 1):
        if mistake.picture:
            mistake.picture = _picture(folder, f"mistakes/{number:02}.png")  # never the path that the file says
            left -= len(mistake.picture or "")
            if left < 0:
                mistake.picture = None
    found.mistakes, found.mistaken = content.worst[:100], (content.mistakes, content.samples)
    found.split = content.split


def _picture(folder: Path, name: str) -> str | None:
    """A small copy, written anew: nothing of the file itself gets into the page."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(plain_file(folder, name), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PICTURE:
                return None
            small = picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB")
    except (Broken, OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE, SIDE))
    kind, out = ("PNG", io.BytesIO()) if max(small.size) <= 48 else ("JPEG", io.BytesIO())
    small.save(out, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def _command(found: Evidence, folder: Path, name: str, verb: str, latest: dict[str, Any]) -> None:
    overrides = yaml.safe_load(plain_file(folder, name, 100_000).read_text(encoding="utf-8"))
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise Broken("it holds no list of overrides")
    meant = {f"{key}=latest": f"{key}={path}" for key, path in latest.items() if isinstance(path, str)}
    command = shlex.join(["boltlab", verb, *(str(meant.get(text, text)) for text in overrides)])
    if len(command) > MAX_COMMAND:
        raise Broken(f"the command has {len(command):,} characters")
    found.overrides, found.command = overrides, command


def _environment(found: Evidence, folder: Path, name: str) -> None:
    content = _json(folder, name)
    commit = content.get("git_commit")
    found.commit = line(commit, MAX_TEXT) if isinstance(commit, str) else None
    parts = [content.get("accelerators") or content.get("cpu"), content.get("platform")]
    parts += [f"Python {content['python']}"] if content.get("python") else []
    packages = content.get("packages")
    torch = packages.get("torch") if isinstance(packages, dict) else None
    parts += [f"torch {torch}"] if torch else []
    texts = [", ".join(map(str, part[:8])) if isinstance(part, list) else str(part) for part in parts if part]
    found.machine = line(", ".join(texts), MAX_TEXT)
    try:
        size = plain_file(folder, "git.patch", 10**12).stat().st_size
    except (FileNotFoundError, Broken):
        size = -1
    if size > 0:
        found.uncommitted = f"git.patch in its folder holds what was not committed ({size:,} bytes)"
    elif content.get("git_dirty"):
        found.uncommitted = "some of it was not committed, and git.patch is not there"
