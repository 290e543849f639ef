"""The part of the page about one run: each section is a function."""

import math
from collections.abc import Sequence
from typing import Any

from boltlab import runs
from boltlab.report import plots
from boltlab.report.read import Mistake
from boltlab.report.tables import Cell, Column, Run, Table, metric_names, number, value
from boltlab.runs.filters import is_number

MAX_CLASSES = 20  # of a matrix that is shown whole
MAX_PAIRS = 15  # of a larger one
_MEASURED = ("best", "final", "test", "val", "train")


def details(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """keys: settings that are not the same in all runs of the page."""
    found = _settings(run, keys)
    for section in (_heading, _metrics, _confusion, _reliability, _mistakes):
        found |= section(run)
    return found


def _measured(run: Run) -> list[str]:
    return [name for name, v in run.row.values.items() if is_number(v) and name.partition("_")[0] in _MEASURED]


def _heading(run: Run) -> dict[str, Any]:
    row = run.row
    best = [name for name in _measured(run) if name.startswith("best_")][:1]
    tested = [name for name in metric_names([row]) if name.startswith("test_")][:1]
    return {
        "of": run,
        "headline": ", ".join(f"{name} {number(row.get(name)).text}" for name in best + tested),
        "folder": str(runs.shown(row.folder)),
    }


def _settings(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    own = [key for key in keys if key in run.row][:100]
    columns = [Column("key", "long"), Column("value", "long")]
    cells = [[Cell(key, kind="long"), Cell(value(run.row.get(key)).text, kind="long")] for key in own]
    caption = f"Settings of {run.name} that other runs here do not share"
    return {"differs": Table(caption, columns, cells) if own else None}


def _metrics(run: Run) -> dict[str, Any]:
    columns, found = [Column("metric"), Column("value", "number")], {}
    for key, title in (("metrics", "Metrics"), ("final", "Metrics of the last epoch")):
        names = [name for name in _measured(run) if name.startswith("final_") == (key == "final")]
        cells = [[Cell(name), number(run.row.get(name))] for name in names]
        found[key] = Table(f"{title} of {run.name}", columns, cells) if cells else None
    return found


def _reliability(run: Run) -> dict[str, Any]:
    from markupsafe import Markup

    if (found := run.evidence.calibration) is None:
        return {"reliability": None}
    columns = [Column("probability"), *(Column(n, "number") for n in ("samples", "mean probability", "right"))]
    cells = [
        [
            Cell(f"{part.low:.3f} to {part.high:.3f}"),
            number(part.samples, "{:,}"),
            number(part.confidence),
            number(part.accuracy),
        ]
        for part in found.bins
    ]
    error, samples = f"{found.error:.4f}", sum(part.samples for part in found.bins)
    reliability = {
        "error": error,
        "label": f"Reliability of {run.name}: expected calibration error {error} over {samples:,} samples;"
        " the numbers of the bins stand in the table below",
        "svg": Markup(plots.draw_reliability(found)),
        "numbers": Table(f"Reliability of {run.name}", columns, cells),
    }
    return {"reliability": reliability}


def _mistakes(run: Run) -> dict[str, Any]:
    evidence, mistaken, left_out = run.evidence, "", ""
    if evidence.mistaken:
        wrong, samples = evidence.mistaken
        mistaken = f"{wrong:,} of {samples:,} samples of the {evidence.split} split are taken for another class."
    tiles = [mistake for mistake in evidence.mistakes if mistake.picture]
    if len(tiles) < len(evidence.mistakes) and (run.row.folder / "mistakes").is_dir():
        left_out = " (Some pictures are left out here: they cannot be read, or the page is full.)"
    table = _worst(evidence.mistakes) if evidence.mistakes else None
    return {"mistaken": mistaken, "tiles": tiles, "mistakes": table, "pictures_left_out": left_out}


def _confusion(run: Run) -> dict[str, Any]:
    """Small ones whole, with how dark each cell is (0 to 10, by the share of its row); of others the worst pairs."""
    if (found := run.evidence.confusion) is None:
        return {"confusion": None}
    names, matrix = found.names, found.matrix
    total = sum(map(sum, matrix))
    right = sum(matrix[i][i] for i in range(len(names)))
    caption = f"{run.evidence.split} split, accuracy {right / max(1, total):.2%} of {total:,}"
    if len(names) <= MAX_CLASSES:
        shades = [[(n, math.ceil(10 * n / max(1, sum(row)))) for n in row] for row in matrix]
        caption = f"Rows: true, columns: predicted; {caption}"
        return {"confusion": {"caption": caption, "names": names, "shades": shades}}
    wrong = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    wrong.sort(key=lambda item: -item[0])
    columns = [Column("true"), Column("predicted"), Column("samples", "number"), Column("of the true class", "number")]
    rows = [
        [Cell(names[i]), Cell(names[j]), number(n, "{:,}"), number(n / max(1, sum(matrix[i])), "{:.1%}")]
        for n, i, j in wrong[:MAX_PAIRS]
    ]
    pairs = Table(f"The most frequent confusions of {len(names)} classes", columns, rows)
    caption += f"; {len(names)} classes: confusion_matrix.csv has all"
    return {"confusion": {"caption": caption, "shades": None, "pairs": pairs}}


def _worst(found: Sequence[Mistake]) -> Table:
    columns = [Column("true"), Column("predicted"), Column("probability", "number"), Column("sample", "number")]
    columns += [Column("file", "long")] if any(mistake.file for mistake in found) else []
    rows = []
    for mistake in found:
        cells = [Cell(mistake.true), Cell(mistake.predicted), number(mistake.probability, "{:.1%}")]
        cells += [number(mistake.index, "{}"), Cell(mistake.file or "", kind="long")]
        rows.append(cells[: len(columns)])
    return Table("Worst first", columns, rows)
