"""What a sweep shows while it runs: on a terminal one live table, elsewhere a line for each trial that ends."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from boltlab import runs
from boltlab.sweeps.study import SAME, Study, counts
from boltlab.sweeps.worker import State

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

REFRESH_SECONDS = 1.0
ROWS = 12  # trials that have ended; those at work are always shown


class Table:
    """The trials of a study. workers: of this command, for the time that is left."""

    def __init__(self, study: Study, workers: int, live: bool) -> None:
        from rich.console import Console

        self.study, self.workers = study, workers
        self.console = Console(markup=False, emoji=False, highlight=False)
        self._live: Any = None
        self._shows_live = live and self.console.is_terminal
        self._at_work: Mapping[int, State] = {}
        self._refreshed = 0.0

    @contextmanager
    def shown(self, at_work: Mapping[int, State]) -> Iterator[None]:
        from rich.live import Live

        self._at_work = at_work
        if not self._shows_live:
            yield
            return
        with Live(self._render(), console=self.console, auto_refresh=False) as self._live:
            yield
            self._live.update(self._render(), refresh=True)

    def update(self) -> None:
        """Shows what is new, at most once a second."""
        if self._live is not None and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self._live.update(self._render(), refresh=True)

    def say(self, line: str) -> None:
        """An event of a trial, where no table shows it."""
        if not self._shows_live:
            print(f"{time.strftime('%H:%M:%S')}  {line}  ({self._progress(self.study.trials())})", flush=True)

    def _progress(self, trials: list["FrozenTrial"]) -> str:
        done = [t for t in trials if counts(t) and t.state.is_finished()]
        best = best_of(self.study, trials)
        words = [f"{len(done)} of {self.study.total}"]
        if best is not None:
            metric = next(iter(self.study.objectives))
            words.append(f"best {metric} {best.values[0]:.4f} of trial {best.number}")
        took = [t.duration.total_seconds() for t in done if t.duration]
        left = self.study.total - len(done)
        if took and left > 0:
            words.append(f"{_duration(left * sum(took) / len(took) / self.workers)} left")
        return ", ".join(words)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Table as Rows
        from rich.text import Text

        trials = self.study.trials()
        rows = Rows("trial", "values", "epoch", *self.study.objectives, "state", box=None, title_justify="left")
        ended = [t for t in trials if t.state.is_finished() and SAME not in t.user_attrs]
        best = best_of(self.study, trials)
        shown = ended[-ROWS:]
        if best is not None and best not in shown:
            shown = [best, *shown[1:]]
        for t in shown:
            values = values_of(self.study, t, " *" if t is best else "")
            epochs = str(max(t.intermediate_values, default=""))
            rows.add_row(str(t.number), params(t.params), epochs, *values, state(t))
        for number, at_work in sorted(self._at_work.items()):
            rows.add_row(str(number), *self._running(at_work))
        elsewhere = sum(t.state.name == "RUNNING" and t.number not in self._at_work for t in trials)
        more_text = f", {elsewhere} at work elsewhere" if elsewhere else ""
        return Group(rows, Text(f"{self._progress(trials)}{more_text}", style="bold"))

    def _running(self, at_work: State) -> list[Any]:
        from rich.text import Text

        value = "" if at_work.value is None else f"{at_work.value:.4f}"
        where = f"{at_work.epoch}{at_work.part and f' of {at_work.part}'}"
        others = [""] * (len(self.study.objectives) - 1)
        return [params(at_work.params), where, value, *others, Text("running", style=runs.Status.RUNNING.colour)]


def ranked(study: Study, trials: list["FrozenTrial"]) -> list["FrozenTrial"]:
    """The trials that have ended, the best by the first objective first; those without a value at the end."""
    sign = -1 if next(iter(study.objectives.values())) == "max" else 1
    ended = [t for t in trials if t.state.is_finished() and SAME not in t.user_attrs]
    return sorted(ended, key=lambda t: (t.state.name != "COMPLETE", sign * (t.values or [0.0])[0], t.number))


def best_of(study: Study, trials: list["FrozenTrial"]) -> "FrozenTrial | None":
    return next((t for t in ranked(study, trials)[:1] if t.state.name == "COMPLETE"), None)


def values_of(study: Study, t: "FrozenTrial", mark: str = "") -> list[str]:
    """A trial's values, one for each objective, with the deviation over its parts; `mark` behind each."""
    values = [f"{value:.4f}{mark}" for value in t.values or ()] or [""] * len(study.objectives)
    values[0] += f" ± {t.user_attrs['deviation']:.4f}" if "deviation" in t.user_attrs else ""
    return values


def params(values: Mapping[str, Any]) -> str:
    """Params in one line, with three digits."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def state(t: "FrozenTrial") -> Any:
    from rich.text import Text

    word = {"COMPLETE": "finished", "FAIL": "failed"}.get(t.state.name, t.state.name.lower())
    reason = str(t.user_attrs.get("reason", "")).splitlines()[:1]
    text = Text(word, style=runs.Status(word).colour)
    return text.append(f"  {reason[0][:60]}", style="default") if reason and word == "failed" else text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
