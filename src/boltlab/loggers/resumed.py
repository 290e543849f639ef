"""Each value once in every tracker, where a run was killed and resumes: metrics.csv says what was logged until then."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boltlab.loggers.csv import CSVLogger

Rows = dict[int, dict[str, float]]  # the values of each step
Points = set[tuple[str, int]]  # metric and step: a value that a tracker has


def earlier(dir: Path, step: int | None) -> Rows:
    """What metrics.csv of a run folder has up to `step`, where the run resumes: what is later is done again. None: all
    it has."""
    if not (dir / "metrics.csv").is_file():
        return {}
    rows = ((int(row.pop("step")), row) for row in CSVLogger(dir)._read())
    return {at: {k: float(v) for k, v in row.items() if v} for at, row in rows if step is None or at <= step}


def lacking(rows: Rows, known: Points) -> Rows:
    """The values of `rows` that a tracker lacks, of what it has; `known` is then what it has of what comes next."""
    found = {step: unknown(values, step, known) for step, values in rows.items()}
    if rows:  # of the last row, the run logs a part again
        known.update((name, max(rows)) for name in rows[max(rows)])
    return {step: values for step, values in found.items() if values}


def unknown(values: Mapping[str, Any], step: int, known: Points) -> dict[str, Any]:
    """The values that are not `known` at `step`, which is forgotten: what is logged once more is logged again."""
    found = {name: value for name, value in values.items() if (name, step) not in known}
    known.difference_update((name, step) for name in values)
    return found
