"""`boltlab runs`: a table of the runs, newest first."""

from datetime import datetime
from itertools import islice
from typing import Any

from boltlab import runs
from boltlab.config import compose


def main(overrides: list[str]) -> int:
    """Prints the table; an empty log folder is no error."""
    config = compose("runs", overrides).config
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "data", "model", "best", "test", "status", "time", "started", box=None)
    for folder in islice(runs.folders(config.log_dir, config.verb), config.limit):
        summary = runs.read_summary(folder)
        state = runs.status(summary, folder)
        started = summary.get("started")
        table.add_row(
            folder.relative_to(runs.Path(config.log_dir) / config.verb).as_posix(),
            str(summary.get("data") or ""),
            str(summary.get("model") or ""),
            _metric(summary.get("best"), ""),
            _metric(summary.get("test"), "acc", "mse"),
            f"[{runs.COLOURS.get(state, 'white')}]{state}[/]",
            _duration(summary.get("seconds")),
            f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}" if started else "",
        )
    if not table.row_count:
        print(f"no run yet under {config.log_dir}/{config.verb}: train one with `boltlab train`")
        return 0
    # On a pipe every column stays whole, so that the table can be searched.
    Console(width=None if Console().is_terminal else 240).print(table)
    return 0


def _metric(values: Any, *endings: str) -> str:
    for key, value in (values or {}).items():
        if any(key.endswith(ending) for ending in endings):
            return f"{key} {value:.4f}"
    return ""


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
