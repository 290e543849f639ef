"""Where predictions are computed, and how they are written."""

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from boltlab.ground.errors import UserError
from boltlab.ground.files import whole
from boltlab.ground.texts import cell


def write(parts: Iterable[str], output: str | None) -> None:
    """Writes predictions, as they come, to the file `output`, or prints them where there is none.

    The file stands in its place when it is whole; after an error, what stood there before does. Names of files that are
    not UTF-8 are written as they are.

    Raises:
        UserError: the file cannot be written, which shows before the first part is asked for.
    """
    if not output:
        sys.stdout.writelines(parts)
        return
    path = Path(output).resolve()  # a link stays one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as file:
            file.writelines(part.encode(errors="surrogateescape") for part in parts)
    except OSError as e:
        raise UserError(f"output={output} cannot be written: {e.strerror or e}") from e


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
