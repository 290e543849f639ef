"""One HTML page of runs side by side: whole in itself, it asks nothing of any network and opens from a folder.

Text is escaped by jinja2; the numbers of a plot stand beside it as a table. Sizes are bounded: curves are thinned,
pictures end at a budget of the page, large matrices become lists.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from boltlab import __version__, runs
from boltlab.config.effects import NO_EFFECT, under
from boltlab.report import plots
from boltlab.report.details import details
from boltlab.report.read import read
from boltlab.report.tables import (
    MAX_COLUMNS,
    Cell,
    Column,
    Run,
    Table,
    listed,
    metric_names,
    number,
    short,
    spread,
    value,
)
from boltlab.runs import table as runs_table
from boltlab.runs.filters import as_text, is_number
from boltlab.runs.index import Row
from boltlab.runs.table import duration

MAX_CURVES = 16  # runs in a plot
MAX_PLOTS = 18
MAX_NUMBERS = 40  # rows below a plot
PICTURES, PICTURES_OF_A_RUN = 10_000_000, 300_000  # bytes
# Settings that say nothing about a result, or follow from others.
NOT_COMPARED = under(*NO_EFFECT, "callbacks", "mode")


def render(rows: Sequence[Row], verb: str, selected: str) -> str:
    """The page of these runs, in their order; `selected` says in words how they were chosen."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here, shown, keys, metrics = Path(__file__).parent, _read(rows, verb), differing(rows), metric_names(rows)
    style, script = (Markup((here / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    words = {text.lstrip("+~").partition("=")[0] for run in shown for text in run.evidence.overrides}
    words |= {f"{word}._target_" for word in words}  # optimizer=sgd
    columns = [key for key in keys if key in ("data", "model")]
    columns += runs_table.differing(rows, first=words, most=MAX_COLUMNS - len(columns))
    content: dict[str, Any] = {
        "title": f"{len(shown)} {'run' if len(shown) == 1 else 'runs'}",
        "selected": selected,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}, boltlab {__version__}",
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "recipes": recipes(shown, columns, metrics),
        "comparison": comparison(shown, columns, metrics),
        "more_keys": len(set(keys) - set(columns)),
        "unfinished": unfinished(shown),
        **curves(shown, columns),
        **throughput(shown),
        "runs": [{**details(run, keys), "open": len(shown) <= 3 or run.number == 1} for run in shown],
    }
    names = {"comparison": "Comparison", "unfinished": "Not finished", "curves": "Curves", "throughput": "Throughput"}
    present = [key for key in names if content.get(key) or key == "curves"]
    content["sections"] = [(key, names[key]) for key in present] + [("runs", "Runs")]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string((here / "page.html").read_text(encoding="utf-8")).render(content).lstrip()


def _read(rows: Sequence[Row], verb: str) -> list[Run]:
    left, shown = PICTURES, []
    for place, row in enumerate(rows, 1):
        source = row.get("reproduces")
        latest = {"run": source or row.get("evaluated"), "init_from": row.get("init_from")}
        evidence = read(row.folder, "reproduce" if source else verb, latest, min(left, PICTURES_OF_A_RUN))
        left -= sum(len(mistake.picture or "") for mistake in evidence.mistakes)
        shown.append(Run(place, row, evidence))
    return shown


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


def comparison(shown: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> Table:
    columns = [Column("run", "long"), Column("status"), *(Column(short(key)) for key in keys)]
    columns += [Column(name, "number") for name in (*metrics, "time", "started")]
    rows = []
    for run in shown:
        get, started = run.row.get, runs.started(run.row.values)
        cells = [run.cell, run.status, *(value(get(key), key) for key in keys)]
        cells += [number(get(name)) for name in metrics]
        cells += [
            Cell(duration(get("seconds")), get("seconds"), "number"),
            Cell(runs_table.date(started), started or None, "number"),
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
    columns = [Column("runs", "long"), Column("n", "number"), *(Column(short(key)) for key in keys)]
    columns += [Column(name, "number") for name in (*metrics, "time")]
    rows = []
    for group in groups.values():
        first = group[0]
        name = first.name if len(group) == 1 else f"{first.row.get('name') or first.name}: {listed(group)}"
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
        if run.status.text != "finished":
            reached = [f"{unit} {run.row.get(unit)}" for unit in ("epochs", "steps") if run.row.get(unit) is not None]
            reason = Cell(str(run.row.get("reason") or ""), kind="text")
            rows.append([run.cell, run.status, reason, Cell(", ".join(reached))])
    columns = [Column("run", "long"), Column("status"), Column("reason", "text"), Column("reached")]
    return Table("Runs that have not come to their end", columns, rows) if rows else None


def throughput(shown: Sequence[Run]) -> dict[str, Any]:
    from markupsafe import Markup

    speeds = {run.number: run.row.get("samples_per_second") for run in shown}
    measured = [run for run in shown if is_number(speeds[run.number])]
    if not measured:
        return {"throughput": None, "throughput_svg": ""}
    columns = [Column("run", "long"), Column("samples per second", "number"), Column("waiting for data", "number")]
    waits = [number(run.row.get("data_wait_share"), "{:.1%}") for run in measured]
    cells = [[run.cell, number(speeds[run.number], "{:,.0f}"), wait] for run, wait in zip(measured, waits, strict=True)]
    bars = [(run.number, float(speeds[run.number])) for run in measured[:MAX_CURVES]]
    svg = Markup(plots.draw_bars(bars, "samples per second"))
    return {"throughput": Table("While training, validation left out", columns, cells), "throughput_svg": svg}


# ---------------------------------------------------------------- curves


def curves(shown: Sequence[Run], columns: Sequence[str]) -> dict[str, Any]:
    """The plots, a legend of the runs that are drawn in them, and what is said of those that are not."""
    having = [run for run in shown if run.evidence.curves]
    of_plots = list(_of_plots(having[:MAX_CURVES]))[:MAX_PLOTS]
    drawn = {run.number: run for _, group in of_plots for run in group}
    reasons = [line for run in shown for line in run.evidence.missing if line.startswith("metrics.csv")]
    reasons.append("metrics.csv holds no values that are drawn here")
    left_out = f"The first {MAX_CURVES} of {len(having)} runs are drawn."
    return {
        "plots": [_plot(name, group) for name, group in of_plots],
        "legend": [_legend(run, columns) for _, run in sorted(drawn.items())],
        "left_out": left_out if len(having) > MAX_CURVES else "",
        "no_curves": "" if of_plots else reasons[0],
    }


def _of_plots(drawn: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """The metric and the runs of each plot. Losses of a regression and of a classification have no scale in common."""
    for monitor in dict.fromkeys(str(run.row.get("monitor")) for run in drawn):
        group = [run for run in drawn if str(run.row.get("monitor")) == monitor]
        # Where no epoch has come to a second value, the steps show how the training went.
        several = any(len(run.evidence.curves.get("train_loss", ())) > 1 for run in group)
        for name in dict.fromkeys(("train_loss" if several else "train_loss_step", "val_loss", monitor)):
            if having_it := [run for run in group if run.evidence.curves.get(name)]:
                yield name, having_it


def _plot(name: str, of: Sequence[Run]) -> dict[str, Any]:
    from markupsafe import Markup

    label = plots.axis([run.evidence.curves[name] for run in of])
    lines = [
        plots.Curve(run.number - 1, run.name, plots.thinned(plots.along(run.evidence.curves[name], label)))
        for run in of
    ]
    of_runs = f"run {of[0].number}" if len(of) == 1 else f"runs {listed(of)}"
    return {
        "name": name,
        "runs": of_runs,
        "label": f"{name} over {label}s, {of_runs}; the numbers stand in the table below",
        "svg": Markup(plots.draw_curves(lines, label)),
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
    texts = [(short(key), value(run.row.get(key), key).text) for key in keys if key != "monitor"]
    settings = ", ".join(text if key in ("data", "model") else f"{key} {text}" for key, text in texts if text)
    look = {"colour": plots.colour(place), "dash": plots.DASHES_SVG[plots.dash(place)]}
    return {"id": run.id, "name": run.name, "settings": settings, **look}
