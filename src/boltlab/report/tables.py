"""The tables of the page, and values as their texts."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from boltlab import runs
from boltlab.report.read import Evidence
from boltlab.runs import table as runs_table
from boltlab.runs.filters import as_text, is_number
from boltlab.runs.index import Row

MAX_COLUMNS = 6  # of the config, and as many of metrics
MAX_VALUE = 120  # characters of a config's value


@dataclass
class Cell:
    """`value`: what the table is sorted by, where the text will not do; `kind`: its class."""

    text: str
    value: float | None = None
    kind: str = ""
    link: str = ""


@dataclass
class Column:
    name: str
    kind: str = ""


@dataclass
class Table:
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


_DATE = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_")


@dataclass
class Run:
    """A run as the page needs it."""

    number: int
    row: Row
    evidence: Evidence

    @property
    def id(self) -> str:
        return f"run-{self.number}"

    @property
    def name(self) -> str:
        """Its number here and its folder, without the time of its start."""
        return f"{self.number}. {_DATE.sub('', self.row.run)}"

    @property
    def cell(self) -> Cell:
        return Cell(self.name, self.number, "long", self.id)

    @property
    def status(self) -> Cell:
        text = str(self.row.get("status") or "unknown")
        return Cell(text, kind=runs.Status(text).value)


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics of the tables: what chose the best checkpoint, then those of the evaluation."""
    names = dict.fromkeys(name for row in rows for name, value in row.values.items() if is_number(value))
    best = [name for name in names if name.startswith("best_")]
    tested = [name for name in names if name.partition("_")[0] in ("test", "val", "train")]
    first = ("acc", "mse", "loss", "r2", "mae", "f1")
    tested.sort(key=lambda name: next((i for i, end in enumerate(first) if name.endswith(f"_{end}")), len(first)))
    return [*best[:3], *tested][:MAX_COLUMNS]


def number(value: Any, form: str = "{:.4f}") -> Cell:
    if not is_number(value):
        return Cell("", kind="number")
    if not math.isfinite(value):
        return Cell(str(value), kind="number")
    if form == "{:.4f}" and not 1e-3 <= abs(value) < 1e7 and value:
        form = "{:.4g}"
    elif form == "{:.4f}" and abs(value) >= 1000:
        form = "{:,.2f}"
    return Cell(form.format(value), value, "number")


def short(key: str) -> str:
    return key.removesuffix("._target_")


def listed(group: Sequence[Run]) -> str:
    """The numbers of runs: "3, 5, 7"."""
    numbers = [str(run.number) for run in group]
    return ", ".join(numbers if len(numbers) <= 8 else [*numbers[:7], "…"])


def value(found: Any, key: str = "") -> Cell:
    if found is None:
        return Cell("")
    text = f"{found:g}" if isinstance(found, float) else as_text(found)
    if key.endswith("._target_"):
        text = text.rpartition(".")[2]
    text = text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
    return Cell(text, found if is_number(found) and math.isfinite(found) else None)


def spread(values: Sequence[Any], form: Callable[[float], str] = lambda value: number(value).text) -> Cell:
    """Mean ± sample standard deviation (number of values) of those that are numbers."""
    known = [float(value) for value in values if is_number(value)]
    if not known:
        return Cell("", kind="number")
    mean = runs_table.mean(known)
    text = form(mean) if len(known) == 1 else f"{form(mean)} ± {form(runs_table.deviation(known))} ({len(known)})"
    return Cell(text, mean if math.isfinite(mean) else None, "number")
