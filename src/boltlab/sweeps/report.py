"""What a sweep leaves: its best config as an experiment, and Optuna's plots as one page and as pictures."""

import html
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.config.overrides import read
from boltlab.config.sources import config_dirs, groups
from boltlab.sweeps import space as spaces
from boltlab.sweeps.study import Study, counts, quiet
from boltlab.sweeps.table import best_of, params, ranked, state, values_of

BEST, PAGE = "best.yaml", "report.html"
_OF_SWEEP = ("test", "log_dir", "name")  # overrides that the sweep has added, or that mean the sweep
ROWS = 10


def write(study: Study) -> None:
    """Writes best.yaml, report.html and a PNG for each plot into the sweep's folder."""
    best = best_of(study, study.trials())
    assert best is not None
    (study.top / BEST).write_text(best_yaml(study, best), encoding="utf-8")
    _plots(study)


def best_yaml(study: Study, best: Any) -> str:
    """The best trial as a file for configs/experiment: what all trials share, and its own values."""
    texts = [*study.asked["train"], *spaces.overrides(best.params)]
    chosen, values, unsaid = _as_file(texts)
    based_on = chosen.pop("experiment", None) or []
    defaults: list[Any] = [*based_on] if isinstance(based_on, list) else [based_on]
    defaults += [{f"override /{group}": choice} for group, choice in chosen.items()]
    name = f"{study.asked['name']}_best"
    place = f"{runs.shown(config_dirs()[0] / 'experiment')}/{name}.yaml"
    results = ", ".join(f"{m} {v:.4f}" for m, v in zip(study.objectives, best.values, strict=True))
    deviation = f" ± {best.user_attrs['deviation']:.4f}" if "deviation" in best.user_attrs else ""
    lines = [
        "# @package _global_",
        f"# cp {shlex.quote(str(runs.shown(study.top / BEST)))} {place}",
        f"# boltlab train experiment={name}{''.join(' ' + shlex.quote(text) for text in unsaid)}",
        f"# {results}{deviation}: trial {best.number}, the best of {sum(map(counts, study.trials()))}.",
    ]
    plain = {"defaults": [*defaults, "_self_"], **values}
    return "\n".join(lines) + "\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _as_file(texts: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Overrides as a file has them: the choices of groups, the values, and those that no file can say."""
    config = compose("train", texts, check=False).config
    chosen: dict[str, Any] = {}
    values, unsaid, known = OmegaConf.create(), [], groups()
    for override in map(read, texts):
        key = override.key_or_group
        if key in _OF_SWEEP or key.startswith("callbacks.latency"):
            continue
        if override.is_delete():
            unsaid.append(override.input_line)
        elif key in known:
            chosen.pop(key, None)
            chosen[key] = override.value()
        elif entry := re.match(r"(.*?)\.\d+(\.|$)", key):  # a file cannot change one entry of a list
            OmegaConf.update(values, entry[1], OmegaConf.select(config, entry[1]), force_add=True)
        else:
            OmegaConf.update(values, key, override.value(), force_add=True)
    plain: Any = OmegaConf.to_container(values)
    return chosen, plain, unsaid


@quiet()
def _plots(study: Study) -> None:
    """Optuna's plots: one page that needs no network, and pictures. Importance as it is printed; Optuna's own default
    grows a forest of trees, and imports scikit-learn for it."""
    import matplotlib
    import optuna.visualization as interactive
    import optuna.visualization.matplotlib as still
    import plotly.io
    from matplotlib.figure import Figure
    from optuna.importance import PedAnovaImportanceEvaluator
    from plotly.offline import get_plotlyjs

    names = list(study.objectives)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {}
    first: dict[str, Any] = {"target": lambda t: t.values[0], "target_name": names[0]} if len(names) > 1 else {}
    if len(names) == 1:
        kinds["history"] = ("plot_optimization_history", {"target_name": names[0]})
        kinds["epochs"] = ("plot_intermediate_values", {})
    else:
        kinds["pareto"] = ("plot_pareto_front", {"target_names": names})
    if len(study.space) > 1:
        kinds["importance"] = ("plot_param_importances", {"evaluator": PedAnovaImportanceEvaluator(), **first})
        kinds["parallel"] = ("plot_parallel_coordinate", first)
    if study.space:
        kinds["slices"] = ("plot_slice", first)
    kinds["timeline"] = ("plot_timeline", {})
    figures: dict[str, str] = {}
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it cannot show, which the page says
            for name, (function, arguments) in kinds.items():
                try:
                    figure = getattr(interactive, function)(study.study, **arguments)
                    figures[name] = plotly.io.to_html(figure, full_html=False, include_plotlyjs=False)
                    drawn = _drawn(getattr(still, function), study, arguments)
                except (ValueError, RuntimeError, ZeroDivisionError) as e:  # too few trials, one value, …
                    figures.setdefault(name, f"<p>not to be shown: {html.escape(str(e).splitlines()[0])}</p>")
                    continue
                if isinstance(drawn, Figure):
                    drawn.savefig(study.top / f"{name}.png", dpi=110, bbox_inches="tight")
                    matplotlib.pyplot.close(drawn)
    finally:
        matplotlib.use(backend)
    sections = "\n".join(f"<h2>{name}</h2>\n<div class=plot>{figure}</div>" for name, figure in figures.items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(study.top.name)}</title>
<style>body{{font-family:system-ui,sans-serif;margin:1rem auto;max-width:70rem;padding:0 1rem}}
.plot,pre{{overflow-x:auto}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{padding:.2rem .6rem;text-align:left}}</style>
<h1>{html.escape(study.top.name)}</h1>
{_table(study)}
<h2>best</h2><pre>{html.escape((study.top / BEST).read_text(encoding="utf-8"))}</pre>
<script>{get_plotlyjs()}</script>
{sections}</html>
"""
    (study.top / PAGE).write_text(page, encoding="utf-8")


def _drawn(plot: Callable[..., Any], study: Study, arguments: Mapping[str, Any]) -> Any:
    axes = plot(study.study, **arguments)
    return getattr(axes.flat[0] if hasattr(axes, "flat") else axes, "figure", None)


def _rows(study: Study, most: int | None = None) -> list[list[str]]:
    rows = []
    for t in ranked(study, study.trials())[:most]:
        reason = str(t.user_attrs.get("reason", ""))
        rows.append([str(t.number), *values_of(study, t), params(t.params), state(t).plain, reason])
    return rows


def _table(study: Study) -> str:
    head = ["trial", *study.objectives, "values", "state", "reason"]
    cells = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>\n" for row in _rows(study))
    return f"<table><thead><tr>{cells}</tr></thead><tbody>\n{rows}</tbody></table>"


def importances(study: Study) -> dict[str, float]:
    """How much of the objective's variance each key explains (PED-ANOVA of the trials that ended); empty for few."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    arguments: dict[str, Any] = {"target": lambda t: t.values[0]} if len(study.objectives) > 1 else {}
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_param_importances(study.study, evaluator=PedAnovaImportanceEvaluator(), **arguments)
    except (ValueError, RuntimeError):
        return {}


def show(study: Study) -> None:
    """Prints the best trials, what mattered, and where all of it is."""
    from rich.console import Console
    from rich.table import Table

    table = Table("trial", *study.objectives, "values", "state", box=None)
    for row in _rows(study, ROWS):
        table.add_row(*row[:-1])
    print()
    Console(width=None if Console().is_terminal else 240, markup=False, emoji=False, highlight=False).print(table)
    if len(study.objectives) > 1:
        with quiet():
            print(f"no other is better in all: trials {', '.join(str(t.number) for t in study.study.best_trials)}")
    if parts := [t for t in ranked(study, study.trials())[:1] if "parts" in t.user_attrs]:
        shown = ", ".join(f"{label} {value:.4f}" for label, value in parts[0].user_attrs["parts"].items())
        print(f"trial {parts[0].number}: {shown}")
    if found := importances(study):
        print("importance: " + ", ".join(f"{key} {share:.2f}" for key, share in found.items()))
    top = runs.shown(study.top)
    print(f"best config  {top / BEST}\nreport       {top / PAGE}")
    if (study.top / "study.db").exists():
        print(f"dashboard    optuna-dashboard sqlite:///{top / 'study.db'} --host 127.0.0.1")
