"""Plots as SVG that is part of the page: its text and lines take the colours of the page's theme."""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from boltlab.report.read import Calibration, Points

COLOURS = 8  # --series-0 … of the page
DASHES = ("solid", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
DASHES_SVG = ("none", "6 2", "1.5 1.5", "6 2 1.5 2")  # the same in the legend
MAX_POINTS = 200  # of a curve

# matplotlib writes colours as numbers: these stand for what the page defines.
_TEXT, _GRID, _PAPER = "#010101", "#010102", "#010103"
_THEME = {_TEXT: "currentColor", _GRID: "var(--line)", _PAPER: "var(--paper)"}
_THEME |= {f"#0201{number:02x}": f"var(--series-{number})" for number in range(COLOURS)}
_SIZE = (4.6, 3.0)  # inches; with text of 12 points it can be read on a phone


@dataclass
class Curve:
    """One line of a plot: of which run, with its colour and dash by `place`."""

    place: int
    name: str
    points: list[tuple[float, float]]


def colour(place: int) -> int:
    return place % COLOURS


def dash(place: int) -> int:
    """The first eight runs differ in colour, neighbours in dashes too, and 32 in one of both."""
    return (place + place // COLOURS) % len(DASHES)


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most so many points: the lowest and the highest of each part, so no spike is lost; first and last stay."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    parts = most // 2 - 1
    edges = [round(i * len(points) / parts) for i in range(parts + 1)]
    for start, end in itertools.pairwise(edges):
        values = [(points[i][1], i) for i in range(start, end)]
        kept |= {min(values)[1], max(values)[1]}
    return [points[i] for i in sorted(kept)]


def axis(curves: Sequence[Points]) -> str:
    """ "epoch" where every epoch of every run has one value, else "step"."""
    for points in curves:
        epochs = [epoch for epoch, _, _ in points]
        if any(math.isnan(epoch) for epoch in epochs) or len(set(epochs)) < len(epochs):
            return "step"
    return "epoch"


def along(points: Points, what: str) -> list[tuple[float, float]]:
    """(x, value), in order; an epoch counts from 1, as the progress bar does."""
    return sorted((epoch + 1 if what == "epoch" else step, value) for epoch, step, value in points)


def draw_curves(curves: Sequence[Curve], label: str) -> str:
    """Lines over `label` ("epoch" or "step"); few points are marked."""

    def draw(axes: Any) -> None:
        for curve in curves:
            x, y = zip(*curve.points, strict=True)
            marker = "o" if len(x) <= 30 else None
            axes.plot(
                *(x, y),
                color=_series(curve.place),
                linestyle=DASHES[dash(curve.place)],
                marker=marker,
                markersize=3.5,
                linewidth=1.6,
            )
        axes.set_xlabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.margins(x=0.03)

    return _svg(draw)


def draw_reliability(calibration: Calibration) -> str:
    """Bars: how many of the samples of each bin are right; a dash on each: how sure the net was of them."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=1, linestyle=DASHES[1])
        for part in (part for part in calibration.bins if part.samples):
            axes.bar(
                *(part.low, part.accuracy, part.high - part.low),
                align="edge",
                color=_series(0),
                edgecolor=_PAPER,
                linewidth=1,
            )
            axes.hlines(part.confidence, part.low, part.high, color=_series(1), linewidth=2.5)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the prediction", ylabel="right")

    return _svg(draw, margins=(0.14, 0.97, 0.2, 0.96))


def draw_bars(values: Sequence[tuple[int, float]], label: str) -> str:
    """A bar for each (number of a run, value), in the run's colour, the first on top."""

    def draw(axes: Any) -> None:
        for row, (number, value) in enumerate(values):
            axes.barh(row, value, height=0.7, color=_series(number - 1))
        axes.set_yticks(range(len(values)), [str(number) for number, _ in values])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.grid(visible=False, axis="y")

    return _svg(draw, height=max(1.4, 0.7 + 0.28 * len(values)))


def _series(place: int) -> str:
    return f"#0201{colour(place):02x}"


_drawn = itertools.count()


def _svg(draw: Callable[[Any], None], height: float = _SIZE[1], margins: tuple[float, ...] | None = None) -> str:
    """`margins`: left, right, bottom and top of the axes; without, there is room for whatever is written there."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    number = next(_drawn)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "boltlab", "font.size": 12, "path.simplify_threshold": 0.5}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT)
    style |= {"axes.edgecolor": _GRID, "grid.color": _GRID, "axes.grid": True, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": True}
    with rc_context(style):
        figure = Figure(figsize=(_SIZE[0], height), layout=None if margins else "constrained")
        if margins:
            figure.subplots_adjust(*(margins[i] for i in (0, 2, 1, 3)))
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), f"plot{number}-")


def _inline(text: str, prefix: str) -> str:
    """An SVG file as a part of a page: no header, no style of its own, no name that another plot has too."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page's own
    text = re.sub(r"\s*\n\s*", "\n", text)
    for number, value in _THEME.items():
        text = text.replace(number, value)
    return text.strip()
