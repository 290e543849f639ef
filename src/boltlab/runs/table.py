"""What the table of `boltlab runs` says: its columns, its order, and runs that differ in their seed as one row."""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Container, Sequence
from datetime import datetime
from typing import Any

from boltlab.config.effects import NO_EFFECT, under
from boltlab.ground.errors import Mistake
from boltlab.ground.texts import line
from boltlab.runs import filters
from boltlab.runs.filters import is_number
from boltlab.runs.index import Row, config_keys

# Columns that are no key of a run, and the keys that they stand for in csv and json.
_MADE = {"best": r"best_.*", "test": r"(test|val|train)_.*", "reached": "epochs|steps|step", "time": "seconds"}
_DEFAULT = ["run", "data", "model", "best", "test", "status", "reached", "time", "started"]
_MOST_DIFFERING = 4
_MEASURED = re.compile(r"(best|final|test|val|train)_|((fit_)?seconds|samples_per_second|data_wait_share)$")
_SMALL_IS_GOOD = re.compile(r"loss|mse|mae|rmse|error|perplexity|seconds$|wait", re.IGNORECASE)
# What differs without telling more than the columns for data and model do, or where a run was and not what it was.
_TELLS_NOTHING = re.compile(
    under(*NO_EFFECT, "callbacks", "monitor", "mode", "test").pattern
    + r"|data\.(seed|mean|std|class_names|input_shape|num_classes|allow_flip|root|url.*|files?)$"
    r"|(data|model|augment)\._target_$|(data\.)?augment\.(input_shape|allow_flip)$"
    r"|model\.(num_classes|optimizer|scheduler|net\.(input_shape|num_outputs|num_classes|_target_))(\.|$)"
)
# What is worth a column although it differs only between data sets or models.
_ALWAYS_TELLS = re.compile(
    r"(optimizer|scheduler)\.|(seed|precision|data\.batch_size|trainer\.(max_epochs|max_steps))$"
)


def column_mistakes(rows: Sequence[Row], columns: Sequence[str] | None) -> list[Mistake]:
    """Columns that are neither ours nor a key of any run."""
    own = {*_DEFAULT, *_MADE}
    asked = [str(column) for column in columns or ()]
    return [m for key in asked if key not in own for m in filters.unknown_key(rows, key, f"columns=[…,{key},…]")]


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs whose configs are equal but for seed and names, each group as its newest stands among the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.recipe, []).append(row)
    return list(groups.values())


def in_order(groups: list[list[Row]], sort: str) -> list[list[Row]]:
    """Sorted by a key: `-key` the largest first, `+key` the smallest; `key` as one wants to see it.

    That is for a metric the best first: the largest; the smallest of best_… with mode=min, of losses and errors. For
    a time the newest, for anything else the smallest or first in the alphabet. What lacks the key stands at the end.
    """
    key = sort.lstrip("+-")
    present, texts, rest = list[list[Row]](), list[list[Row]](), list[list[Row]]()
    for group in groups:
        is_number, is_none = _number(group, key) is not None, _value(group, key) in (None, "")
        (present if is_number else rest if is_none else texts).append(group)
    if sort[0] in "+-":
        down = sort[0] == "-"
    elif key.startswith("best_") and all(group[0].get("mode") in ("min", "max") for group in present):
        down = Counter(group[0].get("mode") for group in present).most_common(1)[:1] != [("min", len(present))]
    else:
        down = key in ("started", "ended") or bool(_MEASURED.match(key) and not _SMALL_IS_GOOD.search(key))
    present.sort(key=lambda group: _number(group, key), reverse=down)
    texts.sort(key=lambda group: filters.as_text(_value(group, key)), reverse=down)
    return [*present, *texts, *rest]


def _number(group: list[Row], key: str) -> Any:
    """A number to sort by, or None; a NaN is none."""
    value = _value(group, key)
    return value if is_number(value) and not math.isnan(value) else None


def counted(group: list[Row]) -> list[Row]:
    """The runs of a group that means are taken of: those finished, the newest of each seed. (The same seed once more,
    by `boltlab reproduce` or by hand, is no other sample.)"""
    finished = [row for row in reversed(group) if row.status == "finished"]
    return [*{tuple(filters.as_text(row.get(key)) for key in ("seed", "data.seed")): row for row in finished}.values()]


def _measured(group: list[Row], key: str) -> list[float]:
    """A key's numbers of the runs of a group that count."""
    return [value for row in counted(group) if is_number(value := row.get(key))]


def _value(group: list[Row], key: str) -> Any:
    """One run's value, and of several the mean of those finished for what is measured, else what all of them have."""
    if len(group) == 1:
        return group[0].get(key)
    if _MEASURED.match(key):
        return mean(known) if (known := _measured(group, key)) else None
    if key == "status":
        return ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in group).most_common())
    if key in ("run", "started", "ended"):
        return group[0].get(key)
    values: list[Any] = [row.get(key) for row in group]
    if all(value == values[0] for value in values):
        return values[0]
    if key == "tags":
        values = [tag for tags in values if isinstance(tags, list) for tag in tags]
    return _distinct(values)


def mean(values: list[float]) -> float:
    """NaN where one of them is no ordinary number."""
    return statistics.fmean(values) if _ordinary(values) else math.nan


def deviation(values: list[float]) -> float:
    """The sample standard deviation of two or more."""
    return statistics.stdev(values) if _ordinary(values) else math.nan


def _ordinary(values: list[float]) -> bool:
    return all(abs(value) < 1e100 for value in values)  # not so NaN


def _distinct(values: list[Any]) -> list[Any]:
    found = {filters.as_text(value): value for value in values}
    return sorted(found.values(), key=lambda value: (not isinstance(value, int | float), filters.as_text(value)))


def records(
    groups: list[list[Row]], columns: Sequence[str] | None, several: bool = False
) -> tuple[list[str], list[dict[str, Any]]]:
    """All keys, and of each row what it has, unrounded.

    several: a row may stand for several runs: `runs` are their names, `n` counts the seeds finished, and
    <metric>_std is the sample standard deviation, null of less than two.
    """
    found = [_record(group, columns, several) for group in groups]
    keys = list(dict.fromkeys(key for record in found for key in record))
    return keys or [str(column) for column in columns or ["run"]], found


def _record(group: list[Row], columns: Sequence[str] | None, several: bool) -> dict[str, Any]:
    if columns is None and not several:
        return {**group[0].values, **group[0].config, **group[0].values}  # the summary's word goes first
    record: dict[str, Any] = {}
    for key in _chosen(list(dict.fromkeys(key for row in group for key in (*row.values, *row.config))), columns):
        record[key] = _value(group, key)
        if several and _MEASURED.match(key):
            values = _measured(group, key)
            record[f"{key}_std"] = deviation(values) if len(values) > 1 else None
    return record | ({"runs": [row.run for row in group], "n": len(counted(group))} if several else {})


def _chosen(keys: list[str], columns: Sequence[str] | None) -> list[str]:
    """The keys that the columns stand for; one that this run lacks is among them."""
    if columns is None:
        return keys
    chosen = []
    for column in map(str, columns):
        chosen += [key for key in keys if re.fullmatch(_MADE[column], key)] if column in _MADE else [column]
    return list(dict.fromkeys(chosen))


def cells(
    groups: list[list[Row]], columns: Sequence[str] | None, several: bool = False, width: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """The table as texts: the columns asked for, or ours and the config keys in which the runs differ, as many of them
    as a `width` has room for."""
    names = [str(column) for column in columns or ()]
    keys: list[str] = []
    if columns is None:
        keys = differing([group[0] for group in groups], of_seeds=several)
        marks = [key for key in ("tags", "note") if any(_value(group, key) for group in groups)]
        names = [*_DEFAULT[:3], *keys, *_DEFAULT[3:], *marks]
    table = [[line(_cell(group, name), 160) for name in names] for group in groups]
    while keys and width and sum(max(map(len, column)) + 2 for column in zip(names, *table, strict=True)) > width:
        at = names.index(keys.pop())
        names, table = [*names[:at], *names[at + 1 :]], [[*row[:at], *row[at + 1 :]] for row in table]
    return names, table


def differing(
    rows: Sequence[Row], of_seeds: bool = False, first: Container[str] = (), most: int = _MOST_DIFFERING
) -> list[str]:
    """The config keys that tell the runs apart: those of `first`, then the most telling ones."""
    keys = config_keys(rows) - ({"seed"} if of_seeds else set())
    kinds = [(row.get("data"), row.get("model")) for row in rows]
    found: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for key in itertools.filterfalse(_TELLS_NOTHING.match, keys):
        values = tuple(filters.as_text(row.get(key, "")) for row in rows)
        if rank := _rank(key, values, rows, kinds, key in first):
            found[values] = min(rank, found.get(values, rank))  # of two that say the same, one
    told: dict[tuple[int, ...], list[str]] = {}  # keys by the runs that they tell apart: of each kind one goes first
    for values, rank in sorted(found.items(), key=lambda item: item[1]):
        told.setdefault(tuple(map(values.index, values)), []).append(rank[-1])
    return [key for same in itertools.zip_longest(*told.values()) for key in same if key][:most]


def _rank(
    key: str, values: tuple[str, ...], rows: Sequence[Row], kinds: Sequence[Any], wanted: bool
) -> tuple[Any, ...] | None:
    """How telling a key with these values is, the least the most; None of one that does not tell the rows apart."""
    if len(set(values)) == 1 or any("${" in value or "/" in value or len(value) > 60 for value in values):
        return None
    within = len(set(zip(kinds, values, strict=True))) > len(set(kinds))
    always = bool(_ALWAYS_TELLS.match(key))
    if not (within or always or wanted):
        return None
    having = sum(key in row for row in rows)
    return (not wanted, not within, key == "seed", -having, not always, key.count("."), key)


def _cell(group: list[Row], name: str) -> str:
    if name in _CELLS:
        return _CELLS[name](group)
    value = _value(group, name)
    if _MEASURED.match(name) and isinstance(value, int | float):
        return _metric(group, name)
    if isinstance(value, list):
        return ",".join(map(filters.as_text, value))
    if value is None:  # a value of null is told from none at all
        return "null" if any("." in name and name in row for row in group) else ""
    return f"{value:g}" if isinstance(value, float) else filters.as_text(value)


def _first(group: list[Row], name: str, endings: tuple[str, ...]) -> str:
    """The first metric of a column, as its name and value."""
    keys = [key for row in group for key in row.values if re.fullmatch(_MADE[name], key) and key.endswith(endings)]
    text = _metric(group, keys[0]) if keys else ""
    return f"{keys[0].removeprefix('best_')} {text}" if text else ""


def date(time: Any) -> str:
    known = isinstance(time, int | float) and 0 < time < 1e11
    return f"{datetime.fromtimestamp(time):%Y-%m-%d %H:%M}" if known else ""


# Columns that are not simply the value of a key.
_CELLS: dict[str, Callable[[list[Row]], str]] = {
    "run": lambda group: group[0].run + f" +{len(group) - 1}" * (len(group) > 1),
    "best": lambda group: _first(group, "best", ("",)),
    "test": lambda group: _first(group, "test", ("acc", "mse")),
    "reached": lambda group: next((f"{unit} {at}" for at, unit in map(_reached, group) if at is not None), ""),
    "time": lambda group: duration(_value(group, "seconds")),
    "seconds": lambda group: duration(_value(group, "seconds")),
    "fit_seconds": lambda group: duration(_value(group, "fit_seconds")),
    "started": lambda group: date(_value(group, "started")),
    "ended": lambda group: date(_value(group, "ended")),
}


def _metric(group: list[Row], key: str) -> str:
    """The number, of several runs `mean ± sample standard deviation (how many)`."""
    if len(group) == 1:
        value = group[0].get(key)
        return f"{value:.4f}" if isinstance(value, int | float) else ""
    values = _measured(group, key)
    if len(values) < 2:
        return f"{values[0]:.4f} (1)" if values else ""
    return f"{mean(values):.4f} ± {deviation(values):.4f} ({len(values)})"


def _reached(row: Row) -> tuple[int | None, str]:
    """How far a run has come: a killed one resumes from there."""
    for key, unit in (("epochs", "epoch"), ("steps", "step"), ("step", "step")):
        if isinstance(row.values.get(key), int):
            return row.values[key], unit
    return None, ""


def duration(seconds: Any) -> str:
    if not is_number(seconds) or not 0 <= seconds < 1e11:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
