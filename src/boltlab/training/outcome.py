"""Reports the result of a run, to people and to trackers."""

from pathlib import Path
from typing import Any

from boltlab import runs


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metric tensors as plain numbers, per-class and other long ones left out."""
    return {key: float(value) for key, value in sorted(metrics.items()) if value.numel() == 1}


def tell_loggers(trainer: Any, **parts: dict[str, float]) -> None:
    """Gives what a run comes to, as `best/val_acc` or `test/acc`, to the loggers that have a place for it."""
    values = {f"{part}/{key.removeprefix(f'{part}_')}": v for part, found in parts.items() for key, v in found.items()}
    for logger in trainer.loggers:
        if values and hasattr(logger, "log_summary"):
            logger.log_summary(values)


def print_end(folder: Path) -> None:
    """Says what a run has reached, and where it stands."""
    summary = runs.read_summary(folder)
    if summary.get("test"):
        chosen = ", ".join(f"{key} {value:.4f}" for key, value in summary.get("best", {}).items())
        best, last = f"best checkpoint ({chosen})", "last weights: no best checkpoint was chosen"
        print_metrics(f"test split, {last if summary.get('tested') == 'last' else best}", summary["test"])
    minutes, seconds = divmod(summary.get("seconds", 0.0), 60)
    print(f"run folder  {runs.shown(folder)}  ({minutes:.0f} min {seconds:.0f} s)", flush=True)


def print_metrics(title: str, metrics: dict[str, float]) -> None:
    """Prints metrics as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4f}")
    print(f"\n{title}")
    Console().print(table)
