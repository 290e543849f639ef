"""What can still be read of a metrics.csv that is damaged."""

import csv
import shutil
import sys
from pathlib import Path


def salvage(path: Path) -> list[dict[str, str]]:
    """The rows that are whole: a number in each of the header's columns, or nothing. The file is kept beside as it is,
    and a line says how many rows there are."""
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")[:-1]  # behind the last is half a row
    header, *rows = [next(csv.reader([line.replace("\0", "\ufffd")]), []) for line in lines or [""]]
    known = header if "step" in header and len(set(header)) == len(header) else []
    kept = [dict(zip(known, row, strict=True)) for row in rows if len(row) == len(known) and _whole(known, row)]
    aside = path.with_name("metrics.damaged.csv")
    shutil.copyfile(path, aside)
    print(f"{path} is damaged: {len(kept)} rows are kept; as it was, it is {aside.name}", file=sys.stderr)
    return kept


def _whole(header: list[str], row: list[str]) -> bool:
    try:
        return bool(row) and int(row[header.index("step")]) >= 0 and all(float(cell or 0) or True for cell in row)
    except ValueError:
        return False
