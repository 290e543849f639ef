"""Where predictions are computed, and how they are written."""

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from boltlab.ground.errors import UserError
from boltlab.ground.texts import cell


def write(text: str, output: str | None, what: str) -> None:
    """Writes predictions to the file `output`, or prints them where there is none."""
    if not output:
        sys.stdout.write(text)
        return
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as e:
        raise UserError(f"output={path} cannot be written: {e.strerror}") from e
    print(f"{what}  {path}")


def as_csv(columns: Sequence[str], rows: Iterable[Iterable[Any]], **options: Any) -> str:
    """CSV with a header; what is None stays empty, and no text is a formula. `options`: of `csv.writer`."""
    text = io.StringIO()
    writer = csv.writer(text, **options)
    writer.writerows(map(cell, row) for row in (columns, *rows))
    return text.getvalue()


def place(device: str, devices: int = 1, rank: int = 0) -> Any:
    """The torch device that `device` means, of process number `rank` of `devices`."""
    import torch

    found = torch.accelerator.current_accelerator() if device == "auto" and torch.accelerator.is_available() else None
    try:
        chosen: Any = found or torch.device("cpu" if device == "auto" else device)
    except RuntimeError as e:
        raise UserError(f"device={device} is none of auto, cpu, cuda, mps") from e
    if devices == 1 or chosen.type == "cpu" or chosen.index is not None:
        return chosen
    if devices > (count := torch.accelerator.device_count()):
        raise UserError(f"devices={devices}: this machine has {count} of {chosen.type}; device=cpu needs none")
    return torch.device(chosen.type, rank)
