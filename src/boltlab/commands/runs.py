"""`boltlab runs`: a table of the runs, newest first."""

from datetime import datetime
from itertools import islice
from typing import Any

from boltlab import runs
from boltlab.config import compose
from boltlab.launchers import slurm


def main(overrides: list[str]) -> int:
    """Prints the table; an empty log folder is no error."""
    config = compose("runs", overrides).config
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", "data", "model", "best", "test", "status", "reached", "time", "started", box=None)
    folders = list(islice(runs.folders(config.log_dir, config.verb), config.limit))
    jobs = slurm.states(folders)
    for folder in folders:
        summary = runs.read_summary(folder)
        state = runs.status(summary, folder, jobs.get(folder))
        started = runs.started(summary)
        table.add_row(
            escape(folder.relative_to(runs.Path(config.log_dir) / config.verb).as_posix()),
            escape(str(summary.get("data") or "")),
            escape(str(summary.get("model") or "")),
            escape(_metric(summary.get("best"), "")),
            escape(_metric(summary.get("test"), "acc", "mse")),
            f"[{runs.COLOURS.get(state, 'white')}]{escape(state)}[/]",
            _reached(summary),
            _duration(summary.get("seconds")),
            f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}" if isinstance(started, int | float) else "",
        )
    if not table.row_count:
        print(f"no run yet under {config.log_dir}/{config.verb}: train one with `boltlab train`")
        return 0
    # On a pipe every column stays whole, so that the table can be searched.
    Console(width=None if Console().is_terminal else 240).print(table)
    return 0


def _reached(summary: dict[str, Any]) -> str:
    """How far a run has come: a killed one goes on from there."""
    for key, unit in (("epochs", "epoch"), ("steps", "step"), ("step", "step")):
        if isinstance(summary.get(key), int):
            return f"{unit} {summary[key]}"
    return ""


def _metric(values: Any, *endings: str) -> str:
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, int | float) and any(key.endswith(ending) for ending in endings):
            return f"{key} {value:.4f}"
    return ""


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e11:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
