"""What differs between two runs, or a run and what is here now: code, machine, packages, data; and their results.

Everything is read from run folders, which may come from anybody: nothing is run from them, and what is printed of them
is plain text.
"""

import csv
import difflib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.ground.errors import ConfigError, Mistake
from boltlab.ground.files import read_bytes
from boltlab.ground.texts import line, print_table
from boltlab.runs import index as history
from boltlab.runs.filters import as_text

# Packages that compute; what begins like these comes before all others.
NUMERICAL = (
    *("torch", "numpy", "scipy", "scikit-learn", "lightning", "pytorch-lightning", "timm", "triton", "nvidia"),
    *("pillow", "simplejpeg", "opencv", "deepspeed", "mkl", "openblas", "boltlab"),
)
TIMES = ("samples_per_second", "data_wait_share")  # columns of metrics.csv that are equal in no two runs
_MOST_BYTES = 100_000_000  # of a patch; a larger one is not read
SHOWN_PACKAGES = 20
SHOWN_FILES = 20
SHOWN_LINES = 8  # of a file's two patches

Row = tuple[str, str, str]  # what, then, now


# ---------------------------------------------------------------- what there was before the training


def environments(then: dict[str, Any], now: dict[str, Any]) -> list[Row]:
    """What differs of two `environment.json`: Python, machine, then packages, those that compute first."""
    keys = {"python": "python", "platform": "platform", "cpu": "cpu", "cpu_count": "cpu cores", "threads": "threads"}
    keys |= {"accelerators": "accelerators", "cuda": "cuda", "processes": "processes"}
    known = [(name, then[key], now[key]) for key, name in keys.items() if key in then and key in now]
    rows = [(name, _listed(a), _listed(b)) for name, a, b in known if a != b]
    ours, theirs = (_by_name(side.get("packages")) for side in (then, now))
    if not ours or not theirs:
        return rows
    changed = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    changed.sort(key=lambda name: (not name.startswith(NUMERICAL), name))
    absent = "not installed"
    rows += [(line(n), line(ours.get(n, absent)), line(theirs.get(n, absent))) for n in changed[:SHOWN_PACKAGES]]
    if len(changed) > SHOWN_PACKAGES:
        rows.append((f"and {len(changed) - SHOWN_PACKAGES} packages more", "", ""))
    return rows


def _listed(value: Any) -> str:
    if isinstance(value, list):
        counted = [(len(list(same)), name) for name, same in itertools.groupby(map(str, value))]
        return line(", ".join(f"{count} x {name}" for count, name in counted)) or "none"
    return "none" if value is None else line(value)


def _by_name(packages: Any) -> dict[str, str]:
    found = packages.items() if isinstance(packages, dict) else ()
    return {re.sub("[-_.]+", "-", str(name)).lower(): str(version) for name, version in found}


def patch_of(folder: Path) -> bytes:
    """A run's uncommitted changes; empty where it has recorded none."""
    return read_bytes(folder / "git.patch", _MOST_BYTES)


def patches(then: bytes, now: bytes, sides: tuple[str, str] = ("then", "now")) -> list[str]:
    """File by file, what two patches of uncommitted changes differ in; nothing where they are the same."""
    wide = max(map(len, sides))
    ours, theirs = _by_file(then), _by_file(now)
    changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    lines = []
    for name in changed[:SHOWN_FILES]:
        a, b = ours.get(name), theirs.get(name)
        lines.append(f"{line(name)}: {sides[0]} {_counted(a)}, {sides[1]} {_counted(b)}")
        if a is not None and b is not None:
            both = list(difflib.unified_diff(a, b, lineterm="", n=0))[2:]
            both = [changed for changed in both if changed[0] in "+-" and changed[1:2] in ("+", "-")]
            lines += [f"    {sides[new[0] == '+']:<{wide}} {line(new[1:], 100)}" for new in both[:SHOWN_LINES]]
            lines += [f"    … and {len(both) - SHOWN_LINES} lines more"] * (len(both) > SHOWN_LINES)
    return lines + [f"and {len(changed) - SHOWN_FILES} files more"] * (len(changed) > SHOWN_FILES)


def _by_file(patch: bytes) -> dict[str, list[str]]:
    parts = re.split(r"^diff --git ", patch.decode(errors="replace"), flags=re.MULTILINE)[1:]
    files = {}
    for part in parts:
        first, _, rest = part.partition("\n")
        files[first.rpartition(" b/")[2].rstrip('"')] = rest.splitlines()
    return files


def _counted(lines: list[str] | None) -> str:
    if lines is None:
        return "as committed"
    if any(line.startswith("GIT binary patch") for line in lines):
        return "binary"
    body = itertools.dropwhile(lambda line: not line.startswith("@@"), lines)
    first = [line[:1] for line in body]
    return f"+{first.count('+')} -{first.count('-')}"


def data(then: dict[str, Any], now: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Of two `data.json`: a row for each split that both know, and what makes the data others ones."""
    from boltlab.data.fingerprint import ROUNDED, differences

    rows, others = [], []
    for split in ("train", "val", "test"):
        a, b = _split(then, split), _split(now, split)
        if not a or not b:
            continue
        found = [line(found) for found in differences(a, b)]
        compared = "contents" if {"contents", "values"} & a.keys() & b.keys() else "names and sizes of files"
        if not {"contents", "values", "names_and_sizes"} & a.keys() & b.keys():
            compared = "labels"
        rows.append((f"data, {split}", f"{line(a.get('samples'))} samples", "; ".join(found) or f"equal ({compared})"))
        others += [f"{split}: {line}" for line in found if line != ROUNDED]
    return rows, others


def _split(content: dict[str, Any], split: str) -> dict[str, Any]:
    splits = content.get("splits")
    found = splits.get(split) if isinstance(splits, dict) else None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Result:
    """One line of the comparison.

    digits: that are equal; infinitely many where all bits are, None where there is nothing to compare.
    detail: what there is to say of a difference.
    """

    what: str
    then: str
    now: str
    digits: float | None
    detail: str = ""
    metric: bool = False

    @property
    def verdict(self) -> str:
        return "not to be compared" if self.digits is None else verdict(self.digits)


def verdict(digits: float) -> str:
    """In words."""
    if digits == math.inf:
        return "equal to the bit"
    return f"equal to {digits:.0f} digit{'s' * (digits > 1)}" if digits else "differs"


def results(then: Path, now: Path) -> list[Result]:
    """Every metric of the summaries, then the weights of each checkpoint, then the rows of metrics.csv."""
    ours, theirs = runs.read_summary(then), runs.read_summary(now)
    found = []
    if ours.get("steps") != theirs.get("steps"):
        found.append(Result("steps", line(ours.get("steps")), line(theirs.get("steps")), 0, metric=True))
    for kind in ("best", "final", "test"):
        a, b = ours.get(kind) or {}, theirs.get(kind) or {}
        found += [_metric(f"{kind} {line(key)}", a.get(key), b.get(key)) for key in sorted({*a, *b})]
    names = {path.name for side in (then, now) for path in (side / "checkpoints").glob("*.ckpt")}
    names = {name for name in names if not re.fullmatch(r"last-\d+\.ckpt", name)}  # older ones, kept by the clock too
    found += [weights(name, then, now) for name in sorted(names)]
    return found + rows(then, now)


def agreement(a: float, b: float) -> float:
    """How many significant digits of two numbers are equal: infinitely many where all bits are, 0 where none is."""
    if float(a).hex() == float(b).hex():
        return math.inf
    apart, larger = abs(a - b), max(abs(a), abs(b))
    if not apart:
        return 17  # 0.0 and -0.0
    return max(0, math.floor(-math.log10(2 * apart / larger))) if math.isfinite(apart) else 0


def _metric(what: str, a: float | None, b: float | None) -> Result:
    a_shown, b_shown = ("nothing" if value is None else f"{value:.9g}" for value in (a, b))
    return Result(what, a_shown, b_shown, 0 if a is None or b is None else agreement(a, b), metric=True)


def weights(name: str, then: Path, now: Path) -> Result:
    """The weights of one checkpoint file of two runs; what metrics have counted is left out."""
    from boltlab.checkpoints import file as checkpoint_file

    files = [side / "checkpoints" / name for side in (then, now)]
    what = f"weights of {line(name)}"
    if not all(file.is_file() for file in files):
        a_shown, b_shown = ("there" if file.is_file() else "no file" for file in files)
        return Result(what, a_shown, b_shown, None)
    try:
        contents = [checkpoint_file.read(file) for file in files]
    except checkpoint_file.CheckpointError as e:
        return Result(what, "", "", None, line(e))
    a_shown, b_shown = (f"step {line(content.get('global_step'))}" for content in contents)
    ours, theirs = map(_compared, contents)
    if ours.keys() != theirs.keys():
        return Result(what, a_shown, b_shown, 0, f"{line(min({*ours} ^ {*theirs}))} is only in one of the two")
    apart = {key: difference for key in ours if (difference := _apart(ours[key], theirs[key])) is not None}
    if not apart:
        return Result(what, a_shown, b_shown, math.inf)
    most = max(apart, key=lambda key: apart[key])
    detail = f"{len(apart)} of {len(ours)} tensors, most {line(most)} by {apart[most]:.2g}"
    return Result(what, a_shown, b_shown, 0, detail)


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content["state_dict"].items() if "_metrics." not in key}


def _apart(a: Any, b: Any) -> float | None:
    """The largest difference between two tensors, infinity where they are of other kinds; None: no bit differs."""
    import torch

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None if a == b else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))):
        return None
    apart = float((a.double() - b.double()).abs().max())
    return apart if math.isfinite(apart) else math.inf


def rows(then: Path, now: Path) -> list[Result]:
    """The rows of metrics.csv, without times: whether all are equal, or the first one that is not."""
    what = "metrics.csv"
    ours, theirs = (_read_rows(side / what) for side in (then, now))
    a_shown, b_shown = ("no file" if side is None else f"{len(side)} rows" for side in (ours, theirs))
    if ours is None or theirs is None:
        return [] if ours is theirs else [Result(what, a_shown, b_shown, None)]
    empty: dict[str, str] = {}
    for a, b in itertools.zip_longest(ours, theirs, fillvalue=empty):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            step, key = line(a.get("step") or b.get("step")), keys[0]
            values = " / ".join(line(side.get(key, "nothing"), 20) for side in (a, b))
            return [Result(what, a_shown, b_shown, 0, f"first at step {step}: {line(key)} {values}")]
    return [Result(what, a_shown, b_shown, math.inf)]


def _read_rows(path: Path) -> list[dict[str, str]] | None:
    """Each row as what it holds; what is empty is left out, for a column may come later in one of two files."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            read = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return None
    return [{k: v for k, v in row.items() if isinstance(v, str) and v and k not in TIMES} for row in read]


# ---------------------------------------------------------------- diff


def diff(words: list[str], options: Any) -> int:
    """`boltlab runs diff`: where two runs differ, in config, environment, data, uncommitted changes and results."""
    if len(words) != 2:
        raise ConfigError([Mistake("runs", f"are two: boltlab runs diff <run> <run>, and not {len(words)}")])
    folders = [runs.find(word, options.log_dir, options.verb) for word in words]
    show_origins(*folders, results=True)
    return 0


def show_origins(*folders: Path, results: bool = False) -> None:
    """Prints where what two runs were made of differs, with `results` their metrics too, and what is equal."""
    both = [history.read(folder) for folder in folders]
    for name, folder in zip("ab", folders, strict=True):
        print(f"{name}  {line(runs.shown(folder))}")
    parts = _parts(*both)
    measured = {"results": _differing(*map(_measured, both))} if results else {}
    for name, found in (parts | measured).items():
        _print_part(name, found)
    if same := [name for name, found in parts.items() if not found]:
        print(f"\nequal: {', '.join(same)}")


def surroundings(folder: Path) -> dict[str, Any]:
    """`environment.json`, and in how many processes the run was trained."""
    known = {key: value for key, value in runs.read_summary(folder).items() if key == "processes"}
    return runs.read_json(folder / "environment.json") | known


def _parts(a: history.Row, b: history.Row) -> dict[str, list[Any]]:
    """What the runs were made of: of each part that can be compared, the differences."""
    unread = [f"that of {name} cannot be read" for name, row in (("a", a), ("b", b)) if not row.config]
    known, others = data(*(runs.read_json(row.folder / "data.json") for row in (a, b)))
    patch_a, patch_b = (patch_of(row.folder) for row in (a, b))
    then, now = (surroundings(row.folder) for row in (a, b))
    commits = line(then.get("git_commit")), line(now.get("git_commit"))
    return {
        "config": unread or _differing(_own(a.config), _own(b.config)),
        "environment": [("git_commit", *commits)] * (commits[0] != commits[1]) + environments(then, now),
        **({"data": [said.replace(", now ", " in a, in b ") for said in others]} if known else {}),
        "uncommitted changes": patches(patch_a, patch_b, ("a", "b")),
    }


def _measured(row: history.Row) -> dict[str, Any]:
    measured = ("best_", "test_", "val_", "train_")
    return {key: value for key, value in row.values.items() if key.startswith(measured)}


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what is only a copy: the model refers to the optimizer, and the data to the augmentation."""
    kept = {}
    for key, value in config.items():
        inner = key.partition(".")[2]
        if not ("." in inner and config.get(inner, _NOTHING) == value) and key != "run_dir":
            kept[key] = value
    return kept


_NOTHING = object()


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    def said(values: dict[str, Any], key: str) -> str:
        return as_text(values[key]) if key in values else "–"

    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key, _NOTHING) != b.get(key, _NOTHING)]
    return [(key, said(a, key), said(b, key)) for key in sorted(keys, key=str.lower)]


def _print_part(title: str, found: list[Any]) -> None:
    """`found`: lines, or rows of a table."""
    if found and isinstance(found[0], str):
        print("\n".join([f"\n{title}", *(f"  {said}" for said in found)]))
    elif found:
        print()
        print_table((title, "a", "b"), ([line(cell, 120) for cell in row] for row in found))
