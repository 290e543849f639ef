"""One HTML page of runs side by side: whole in itself, it asks nothing of any network and opens from a folder.

Text is escaped by jinja2; the numbers of a plot stand beside it as a table. Sizes are bounded: curves are thinned,
pictures end at a budget of the page, large matrices become lists.
"""

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from boltlab import __version__, runs
from boltlab.report import plots
from boltlab.report.read import Confusion, Evidence, Mistake, read
from boltlab.runs import index as history
from boltlab.runs import table as runs_table
from boltlab.runs.filters import as_text, is_number
from boltlab.runs.index import Row
from boltlab.runs.table import duration

MAX_CURVES = 16  # runs in a plot
MAX_PLOTS = 18
MAX_COLUMNS = 6  # of the config, and as many of metrics
MAX_CLASSES = 20  # of a matrix that is shown whole
MAX_PAIRS = 15  # of a larger one
MAX_NUMBERS = 40  # rows below a plot
MAX_VALUE = 120  # characters of a config's value
PICTURES, PICTURES_OF_A_RUN = 10_000_000, 300_000  # bytes
# Settings that say nothing about a result, or follow from others.
NOT_COMPARED = history.under(*history.HARMLESS, "callbacks", "mode")


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


def render(rows: Sequence[Row], verb: str, selected: str) -> str:
    """The page of these runs, in their order; `selected` says in words how they were chosen."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    left, shown = PICTURES, []
    for number, row in enumerate(rows, 1):
        source = row.get("reproduces")
        latest = {"run": source or row.get("evaluated"), "init_from": row.get("init_from")}
        evidence = read(row.folder, "reproduce" if source else verb, latest, min(left, PICTURES_OF_A_RUN))
        left -= sum(len(mistake.picture or "") for mistake in evidence.mistakes)
        shown.append(Run(number, row, evidence))
    here = Path(__file__).parent
    style, script = (Markup((here / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    keys = differing(rows)
    words = {text.lstrip("+~").partition("=")[0] for run in shown for text in run.evidence.overrides}
    words |= {f"{word}._target_" for word in words}  # optimizer=sgd
    columns = [key for key in keys if key in ("data", "model")]
    columns += runs_table.differing(rows, first=words, most=MAX_COLUMNS - len(columns))
    metrics = metric_names(rows)
    drawn, no_curves = curves(shown), ""
    if not drawn[0]:
        reasons = [line for run in shown for line in run.evidence.missing if line.startswith("metrics.csv")]
        no_curves = reasons[0] if reasons else "metrics.csv holds no values that are drawn here"
    content: dict[str, Any] = {
        "title": f"{len(shown)} {'run' if len(shown) == 1 else 'runs'}",
        "selected": selected,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}, boltlab {__version__}",
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "recipes": recipes(shown, columns, metrics),
        "comparison": comparison(shown, columns, metrics),
        "more_keys": len([key for key in keys if key not in columns]),
        "unfinished": unfinished(shown),
        "plots": [{**plot, "svg": Markup(plot["svg"])} for plot in drawn[0]],
        "legend": [_legend(run, columns) for run in drawn[1]],
        "left_out": drawn[2],
        "no_curves": no_curves,
        "throughput": None,
        "throughput_svg": "",
        "runs": [_details(run, keys, len(shown) <= 3 or run.number == 1) for run in shown],
    }
    if measured := [run for run in shown if is_number(run.row.get("samples_per_second"))]:
        content["throughput"] = throughput(measured)
        bars = [(run.number, float(run.row.get("samples_per_second"))) for run in measured[:MAX_CURVES]]
        content["throughput_svg"] = Markup(plots.draw_bars(bars, "samples per second"))
    names = {"comparison": "Comparison", "unfinished": "Not finished", "curves": "Curves", "throughput": "Throughput"}
    present = [key for key in names if content.get(key) or key == "curves"]
    content["sections"] = [(key, names[key]) for key in present] + [("runs", "Runs")]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string((here / "page.html").read_text(encoding="utf-8")).render(content).lstrip()


# ---------------------------------------------------------------- comparing


def differing(rows: Sequence[Row]) -> list[str]:
    """Keys whose values are not the same in all rows, those of the config that only repeat another left out."""
    known: dict[str, None] = {}
    for row in rows:
        known.update(dict.fromkeys(row.config))
    found: dict[tuple[str, ...], str] = {}
    for key in ["data", "model", *sorted(known, key=lambda key: (key.count("."), key))]:
        if NOT_COMPARED.match(key):
            continue
        values = tuple(as_text(row.get(key)) if key in row else "" for row in rows)
        if len(set(values)) > 1:
            # model.optimizer.lr is optimizer.lr
            found.setdefault((key.rpartition(".")[2], *values), key)
    return list(found.values())


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics of the tables: what chose the best checkpoint, then those of the evaluation."""
    names = dict.fromkeys(name for row in rows for name, value in row.values.items() if is_number(value))
    best = [name for name in names if name.startswith("best_")]
    tested = [name for name in names if name.partition("_")[0] in ("test", "val", "train")]
    first = ("acc", "mse", "loss", "r2", "mae", "f1")
    tested.sort(key=lambda name: next((i for i, end in enumerate(first) if name.endswith(f"_{end}")), len(first)))
    return [*best[:3], *tested][:MAX_COLUMNS]


def comparison(shown: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> Table:
    columns = [Column("run", "long"), Column("status"), *(Column(_short(key)) for key in keys)]
    columns += [Column(name, "number") for name in (*metrics, "time", "started")]
    rows = []
    for run in shown:
        get = run.row.get
        status, started = str(get("status") or "unknown"), runs.started(run.row.values)
        cells = [run.cell, Cell(status, kind=_kind(status)), *(value(get(key), key) for key in keys)]
        cells += [number(get(name)) for name in metrics]
        cells += [
            Cell(duration(get("seconds")), get("seconds"), "number"),
            Cell(f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}" if started else "", started or None, "number"),
        ]
        rows.append(cells)
    return Table("Every run, with the settings that differ", columns, rows)


def recipes(shown: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> Table | None:
    """Runs that differ in nothing but their seed as one row: mean ± standard deviation; None where all are single."""
    groups: dict[str, list[Run]] = {}
    for run in shown:
        groups.setdefault(run.row.recipe, []).append(run)
    if len(groups) == len(shown):
        return None
    keys = [key for key in keys if key != "seed"]
    columns = [Column("runs", "long"), Column("n", "number"), *(Column(_short(key)) for key in keys)]
    columns += [Column(name, "number") for name in (*metrics, "time")]
    rows = []
    for group in groups.values():
        first = group[0]
        name = first.name if len(group) == 1 else f"{first.row.get('name') or first.name}: {_listed(group)}"
        cells = [Cell(name, first.number, "long", first.id), Cell(str(len(group)), len(group), "number")]
        cells += [value(first.row.get(key), key) for key in keys]
        ended = runs_table.counted([run.row for run in group])
        cells += [spread([row.get(metric) for row in ended]) for metric in metrics]
        rows.append([*cells, spread([row.get("seconds") for row in ended], duration)])
    caption = "Runs that differ only in their seed together: mean ± standard deviation of those finished (seeds)"
    return Table(caption, columns, rows)


def unfinished(shown: Sequence[Run]) -> Table | None:
    """Why runs failed or stopped, and how far they came."""
    rows = []
    for run in shown:
        status = str(run.row.get("status") or "unknown")
        if status != "finished":
            reached = [f"{unit} {run.row.get(unit)}" for unit in ("epochs", "steps") if run.row.get(unit) is not None]
            cells = [run.cell, Cell(status, kind=_kind(status)), Cell(str(run.row.get("reason") or ""), kind="text")]
            rows.append([*cells, Cell(", ".join(reached))])
    columns = [Column("run", "long"), Column("status"), Column("reason", "text"), Column("reached")]
    return Table("Runs that have not come to their end", columns, rows) if rows else None


def throughput(measured: Sequence[Run]) -> Table:
    columns = [Column("run", "long"), Column("samples per second", "number"), Column("waiting for data", "number")]
    rows = [
        [
            run.cell,
            number(run.row.get("samples_per_second"), "{:,.0f}"),
            number(run.row.get("data_wait_share"), "{:.1%}"),
        ]
        for run in measured
    ]
    return Table("While training, validation left out", columns, rows)


# ---------------------------------------------------------------- curves


def curves(shown: Sequence[Run]) -> tuple[list[dict[str, Any]], list[Run], str]:
    """The plots, the runs that are drawn in them, and what is said of those that are not."""
    having = [run for run in shown if run.evidence.curves]
    drawn = having[:MAX_CURVES]
    found: list[dict[str, Any]] = []
    used: dict[int, Run] = {}
    # Losses of a regression and of a classification have no scale in common.
    for monitor in dict.fromkeys(str(run.row.get("monitor")) for run in drawn):
        group = [run for run in drawn if str(run.row.get("monitor")) == monitor]
        # Where no epoch has come to a second value, the steps show how the training went.
        several = any(len(run.evidence.curves.get("train_loss", ())) > 1 for run in group)
        for name in dict.fromkeys(("train_loss" if several else "train_loss_step", "val_loss", monitor)):
            having_it = [run for run in group if run.evidence.curves.get(name)]
            if having_it and len(found) < MAX_PLOTS:
                used |= {run.number: run for run in having_it}
                found.append(_plot(name, having_it))
    left_out = "" if len(having) <= len(drawn) else f"The first {len(drawn)} of {len(having)} runs are drawn."
    return found, [used[number] for number in sorted(used)], left_out


def _plot(name: str, of: Sequence[Run]) -> dict[str, Any]:
    label = plots.axis([run.evidence.curves[name] for run in of])
    lines = [
        plots.Curve(run.number - 1, run.name, plots.thinned(plots.along(run.evidence.curves[name], label)))
        for run in of
    ]
    of_runs = f"run {of[0].number}" if len(of) == 1 else f"runs {_listed(of)}"
    return {
        "name": name,
        "runs": of_runs,
        "label": f"{name} over {label}s, {of_runs}; the numbers stand in the table below",
        "svg": plots.draw_curves(lines, label),
        "numbers": _numbers(name, label, lines, of),
    }


def _numbers(name: str, label: str, lines: Sequence[plots.Curve], of: Sequence[Run]) -> Table:
    """The values below a plot: a row an x, spread evenly where there are many."""
    values = [dict(line.points) for line in lines]
    every = sorted({x for line in values for x in line})
    if len(every) > MAX_NUMBERS:
        every = [every[round(i * (len(every) - 1) / (MAX_NUMBERS - 1))] for i in range(MAX_NUMBERS)]
    rows = [[Cell(f"{x:g}", x), *(number(line.get(x)) for line in values)] for x in every]
    caption = f"{name}, a column a run: " + ", ".join(run.name for run in of)
    return Table(caption, [Column(label), *(Column(str(run.number), "number") for run in of)], rows)


def _legend(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    place = run.number - 1
    texts = [(_short(key), value(run.row.get(key), key).text) for key in keys if key != "monitor"]
    settings = ", ".join(text if key in ("data", "model") else f"{key} {text}" for key, text in texts if text)
    look = {"colour": plots.colour(place), "dash": plots.DASHES_SVG[plots.dash(place)]}
    return {"id": run.id, "name": run.name, "settings": settings, **look}


# ---------------------------------------------------------------- one run


def _details(run: Run, keys: Sequence[str], is_open: bool) -> dict[str, Any]:
    from markupsafe import Markup

    row, evidence = run.row, run.evidence
    status = str(row.get("status") or "unknown")
    # Not `value`: Python 3.12.0 to 3.12.3 would then look for the function below among the locals.
    names = [name for name, found in row.values.items() if is_number(found) and name.partition("_")[0] in _MEASURED]
    best = next((name for name in names if name.startswith("best_")), None)
    tested = next((name for name in metric_names([row]) if name.startswith("test_")), None)
    said = [f"{name} {number(row.get(name)).text}" for name in (best, tested) if name is not None]
    details: dict[str, Any] = {
        "id": run.id,
        "number": run.number,
        "name": run.name,
        "open": is_open,
        "status": status,
        "status_kind": _kind(status),
        "headline": ", ".join(said),
        "reason": row.get("reason"),
        "note": row.get("note"),
        "folder": str(runs.shown(row.folder)),
        "evidence": evidence,
        "metrics": None,
        "final": None,
        "differs": None,
        "confusion": evidence.confusion and _confusion(evidence.confusion, evidence.split),
        "reliability": None,
        "mistaken": "",
        "tiles": [mistake for mistake in evidence.mistakes if mistake.picture],
        "mistakes": _mistakes(evidence.mistakes) if evidence.mistakes else None,
        "pictures_left_out": "",
    }
    if evidence.mistaken:
        wrong, samples = evidence.mistaken
        details["mistaken"] = (
            f"{wrong:,} of {samples:,} samples of the {evidence.split} split are taken for another class."
        )
    if names:
        columns = [Column("metric"), Column("value", "number")]
        for key, final in (("metrics", False), ("final", True)):
            cells = [[Cell(name), number(row.get(name))] for name in names if name.startswith("final_") == final]
            details[key] = Table(f"{_TITLES[key]} of {run.name}", columns, cells) if cells else None
    if own := [key for key in keys if key in row][:100]:
        columns = [Column("key", "long"), Column("value", "long")]
        cells = [[Cell(key, kind="long"), Cell(value(row.get(key)).text, kind="long")] for key in own]
        details["differs"] = Table(f"Settings of {run.name} that other runs here do not share", columns, cells)
    if found := evidence.calibration:
        columns = [Column("probability"), *(Column(n, "number") for n in ("samples", "mean probability", "right"))]
        cells = [
            [Cell(f"{low:.3f} to {high:.3f}"), Cell(f"{samples:,}", samples, "number"), number(sure), number(right)]
            for low, high, samples, sure, right in found.bins
        ]
        error = f"{found.error:.4f}"
        details["reliability"] = {
            "error": error,
            "label": f"Reliability of {run.name}: expected calibration error {error} over {found.samples:,} samples;"
            " the numbers of the bins stand in the table below",
            "svg": Markup(plots.draw_reliability(found)),
            "numbers": Table(f"Reliability of {run.name}", columns, cells),
        }
    if len(details["tiles"]) < len(evidence.mistakes) and (row.folder / "mistakes").is_dir():
        details["pictures_left_out"] = " (Some pictures are left out here: they cannot be read, or the page is full.)"
    return details


_TITLES = {"metrics": "Metrics", "final": "Metrics of the last epoch"}
_MEASURED = ("best", "final", "test", "val", "train")


def _confusion(confusion: Confusion, split: str) -> dict[str, Any]:
    """Small ones whole, with how dark each cell is (0 to 10, by the share of its row); of others the worst pairs."""
    names, matrix = confusion.names, confusion.matrix
    total = sum(map(sum, matrix))
    right = sum(matrix[i][i] for i in range(len(names)))
    caption = f"{split} split, accuracy {right / max(1, total):.2%} of {total:,}"
    if len(names) <= MAX_CLASSES:
        shades = [[(n, math.ceil(10 * n / max(1, sum(row)))) for n in row] for row in matrix]
        return {"caption": f"Rows: true, columns: predicted; {caption}", "names": names, "shades": shades}
    wrong = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    wrong.sort(key=lambda item: -item[0])
    columns = [Column("true"), Column("predicted"), Column("samples", "number"), Column("of the true class", "number")]
    rows = [
        [Cell(names[i]), Cell(names[j]), Cell(f"{n:,}", n, "number"), number(n / max(1, sum(matrix[i])), "{:.1%}")]
        for n, i, j in wrong[:MAX_PAIRS]
    ]
    pairs = Table(f"The most frequent confusions of {len(names)} classes", columns, rows)
    return {"caption": f"{caption}; {len(names)} classes: confusion_matrix.csv has all", "shades": None, "pairs": pairs}


def _mistakes(found: Sequence[Mistake]) -> Table:
    columns = [Column("true"), Column("predicted"), Column("probability", "number"), Column("sample", "number")]
    columns += [Column("file", "long")] if any(mistake.file for mistake in found) else []
    rows = []
    for mistake in found:
        place = Cell("" if mistake.index is None else str(mistake.index), mistake.index, "number")
        cells = [Cell(mistake.true), Cell(mistake.predicted), number(mistake.probability, "{:.1%}"), place]
        rows.append([*cells, Cell(mistake.file or "", kind="long")][: len(columns)])
    return Table("Worst first", columns, rows)


# ---------------------------------------------------------------- values as text


def _kind(status: str) -> str:
    return status if status in runs.COLOURS else "unknown"


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


def _short(key: str) -> str:
    return key.removesuffix("._target_")


def _listed(group: Sequence[Run]) -> str:
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
