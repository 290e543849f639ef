"""A worker of a sweep: takes a trial, trains it in a process of its own, tells the study the result, and repeats.

A trial is one run, or several parts: one for each seed and fold. They train one after another, and after each epoch the
pruner sees the mean of the parts that have reached it. If nothing is pruned, idle workers take parts too.
"""

import csv
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.ground import signals
from boltlab.ground.errors import UserError
from boltlab.processes.launchers.process import Job, Place, Pool
from boltlab.sweeps.space import overrides
from boltlab.sweeps.study import Claimed, Lost, Study

POLL_SECONDS = 0.1
WAIT_SECONDS = 2.0  # between two looks at what others are at work on
PRUNE_SIGNAL = signals.STOPPING[0]  # SIGTERM: the run saves, and could go on
MAX_DEAD = 5  # trials that die before any other has come to an end: it is no accident then
# Of the summary, and whether it is better when it is larger.
FROM_SUMMARY = {"parameters": False, "seconds": False, "samples_per_second": True, "latency_ms": False}


class Dead(Exception):
    """A run of a trial ended without a result.

    diverged: the same values would diverge again, and the sampler is to keep away from them.
    hopeless: nor would another try begin, or have a result.
    """

    def __init__(self, reason: str, diverged: bool = False, hopeless: bool = False) -> None:
        self.diverged, self.hopeless = diverged, hopeless
        super().__init__(reason)


class Pruned(Exception):
    """The pruner has ended a trial."""


class Left(Exception):
    """This command was told to stop while a trial was running: the trial has saved, and resumes later."""


@dataclass
class Part:
    """One run of a trial: what it adds to the overrides, and to the folder's name."""

    label: str
    overrides: Sequence[str]


@dataclass
class State:
    """A trial that is running here, as the table shows it."""

    params: dict[str, Any]
    begun: float = field(default_factory=time.monotonic)
    epoch: int = 0
    value: float | None = None
    part: str = ""
    over: bool = False  # a part of it has failed, and the others need not go on
    series: dict[str, list[float]] = field(default_factory=dict)  # of each part: the first objective, epoch by epoch


class Worker:
    """The trials of one command, as many at a time as there are `places`.

    prepare: makes the run of (overrides, folder). entry: module:function that a run's process calls with its folder.
    """

    def __init__(
        self,
        study: Study,
        parts: Sequence[Part],
        places: Sequence[Place],
        prepare: Callable[[list[str], Path], None],
        entry: str,
        deadline: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.parts, self.prepare, self.entry, self.say = study, list(parts), prepare, entry, say
        self.deadline = deadline
        self.at_work: dict[int, State] = {}
        self.trouble: BaseException | None = None
        self.dead = 0
        self._ended_well = any(t.state.name == "COMPLETE" for t in study.trials())
        self._pool = Pool(places)
        self._prunes = not self.study.asked["pruner"]["_target_"].endswith(".NopPruner")

    def run(self, watch: Callable[[], None]) -> None:
        """Works until there is nothing left to do; `watch` is called all the while.

        Raises:
            Stopped: this command was told to stop; the trials at work have saved.
        """
        with signals.passed_on(self._pool.send), ThreadPoolExecutor(self._pool.size) as threads:
            working = [threads.submit(self._work) for _ in range(self._pool.size)]
            while wait(working, timeout=0.2).not_done:
                try:
                    if self.trouble is None:
                        self.study.alive()
                        watch()
                except BaseException as e:
                    self._fails(e)
            if self.trouble is not None:
                raise self.trouble

    def _fails(self, error: BaseException) -> None:
        """This program fails: the trials at work save, all workers end, and the command ends with the error."""
        self.trouble = self.trouble or error

    def _work(self) -> None:
        try:
            while not self._over():
                # A worker that comes back after the time limit continues with what had begun.
                if (claimed := self.study.take(new=not self._late())) is not None:
                    self._try(claimed)
                if self._late() or (claimed is None and not self.study.others()):
                    break
                if claimed is None:  # one that dies is for those who are left
                    time.sleep(WAIT_SECONDS)
        except BaseException as e:
            self._fails(e)

    def _late(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline

    def _over(self) -> bool:
        hopeless = self.dead >= MAX_DEAD and not self._ended_well
        return bool(signals.inbox.stop or hopeless or self.trouble)

    def _try(self, claimed: Claimed) -> None:
        try:
            self._try_it(claimed)
        except Lost:
            self.study.release(claimed)
            self.say(f"trial {claimed.number} was taken over by another worker")

    def _try_it(self, claimed: Claimed) -> None:
        number = claimed.number
        if reason := claimed.hopeless():
            self.study.fail(claimed, reason, again=False)
            self.say(f"trial {number} is given up: {reason}")
            return
        state = self.at_work[number] = State(claimed.params)
        try:
            found = self._train(claimed, state)
        except Pruned:
            self._ended_well = True
            self.study.prune(claimed, reason=f"pruned at epoch {state.epoch}{state.part and f' of {state.part}'}")
            self.say(f"trial {number} pruned at epoch {state.epoch}: {_shown(state.value)}")
        except Left:
            self.study.leave(claimed)
            self.say(f"trial {number} has saved, and resumes when this command is given again")
        except Dead as e:
            if e.diverged:  # the same values would diverge again; the sampler is to keep away from them
                self.study.prune(claimed, reason=str(e))
                self.say(f"trial {number} diverged: {e}")
            else:
                self.dead += 1
                again = self.study.fail(claimed, str(e), again=not e.hopeless)
                how = " and is tried again" if again else "" if e.hopeless else ", twice"
                self.say(f"trial {number} died{how}: {e}")
        else:
            self._ended_well = True
            values, more = outcome(dict(zip((part.label for part in self.parts), found, strict=True)))
            self.study.complete(claimed, values, **more)
            self.say(f"trial {number} finished: {', '.join(map(_shown, values))}")
        finally:
            del self.at_work[number]

    def _train(self, claimed: Claimed, state: State) -> list[list[float]]:
        """The values of the objectives, of each part."""
        if self._prunes or len(self.parts) == 1:
            return [self._run(claimed, part, state) for part in self.parts]
        return self._run_together(claimed, state)

    def _run_together(self, claimed: Claimed, state: State) -> list[list[float]]:
        """The values of each part; where one fails, the others save, and its error is raised."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            waiting = [pool.submit(self._run, claimed, part, state) for part in self.parts]
            wait(waiting, return_when=FIRST_EXCEPTION)
            if any(one.done() and one.exception() for one in waiting):
                state.over = True
        if errors := [error for one in waiting if (error := one.exception()) is not None]:
            raise next((error for error in errors if not isinstance(error, Left)), errors[0])
        return [one.result() for one in waiting]

    def _run(self, claimed: Claimed, part: Part, state: State) -> list[float]:
        """Trains or resumes one part, and returns the values of its objectives.

        Raises:
            Pruned, Left, Dead
        """
        folder = self.study.folder(claimed.number, part.label)
        status = runs.status(runs.read_summary(folder), folder)
        if status == "pruned":  # by a worker that was killed before it could tell
            raise Pruned
        if status != "finished":
            if (folder / "config.yaml").is_file() and not status.resumable and status not in ("queued", "failed"):
                raise Dead(f"{folder.name} is {status} by another process")
            self._process(claimed, part, folder, state)
        values = [value_of(folder, metric, mode) for metric, mode in self.study.objectives.items()]
        self._look(claimed, part, folder, state)
        state.value = values[0]
        return values

    def _process(self, claimed: Claimed, part: Part, folder: Path, state: State) -> None:
        """Trains the run in a process of its own, and reads what it logs."""
        with self._pool.place() as place:
            begun = any(self.study.folder(claimed.number, p.label).exists() for p in self.parts)
            if self._stops(state) or (self._late() and not begun):
                raise Left
            self._prepare(claimed, part, folder)
            with self._pool.job(self.entry, folder, place) as job:
                pruned = self._watch(job, claimed, part, folder, state)
                code = job.wait()
        self._judge(folder, state, code, pruned)

    def _stops(self, state: State) -> bool:
        return bool(signals.inbox.stop or self.trouble or state.over)

    def _watch(self, job: Job, claimed: Claimed, part: Part, folder: Path, state: State) -> bool:
        """Follows a run until its process ends; returns whether the pruner has ended it."""
        state.part = part.label
        seen, pruned, told = 0, False, False
        while job.running(POLL_SECONDS):
            if (now := _stamp(folder / "metrics.csv")) != seen and not pruned:
                seen = now
                pruned = self._look(claimed, part, folder, state) and not signals.inbox.stop
            # The same signal twice would end the process without a checkpoint.
            if (pruned or self.trouble or state.over) and not told and not signals.inbox.stop:
                told = True
                job.send(PRUNE_SIGNAL)
        return pruned

    def _judge(self, folder: Path, state: State, code: int, pruned: bool) -> None:
        """
        Raises:
            Pruned, Left, Dead: the run did not come to its end.
        """
        summary = runs.read_summary(folder)
        if runs.status(summary, folder) == "finished":  # it may have come to its end before the pruner had thought
            return
        if pruned:
            runs.write_summary(folder, status="pruned", reason=f"pruned at epoch {state.epoch}")
            raise Pruned
        if self._stops(state):
            raise Left
        if code < 0:
            name = signals.name(-code)
            runs.end(folder, status="failed", reason=f"killed by {name}")
            memory = " (by the system, if the memory was full)" if -code == 9 else ""
            raise Dead(f"killed by {name}{memory}")
        reason = str(summary.get("reason") or f"ended with exit code {code}")
        raise Dead(reason, diverged=summary.get("error") == "NonFiniteLoss")

    def _prepare(self, claimed: Claimed, part: Part, folder: Path) -> None:
        """Makes the run, if that was not done.

        Raises:
            Dead: the values do not go together, or something on this machine is missing.
        """
        if (folder / "config.yaml").is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)  # whoever made it was killed before it was a run
        try:
            self.prepare([*self.study.asked["train"], *overrides(claimed.params), *part.overrides], folder)
        except UserError as e:
            shutil.rmtree(folder, ignore_errors=True)
            raise Dead(" ".join(str(e).split())[:500], hopeless=True) from None

    def _look(self, claimed: Claimed, part: Part, folder: Path, state: State) -> bool:
        """Reads what a run has logged, tells the study what is new, and returns whether to prune."""
        values = column(folder, next(iter(self.study.objectives)))
        before = len(state.series.get(part.label, []))
        state.series[part.label] = values
        state.epoch = len(values)
        if not self._prunes:
            return False
        # A part that stopped early is as long as the others: the same step is the same epoch of the same part.
        done = self.parts.index(part) * self.study.asked["validations"]
        for epoch in range(before, len(values)):
            mean = statistics.fmean(s[epoch] for s in state.series.values() if len(s) > epoch)
            state.value = mean
            if self.study.report(claimed, mean, done + epoch + 1):
                return True
        return False


def value_of(folder: Path, metric: str, mode: str) -> float:
    """The best value of a metric that is logged each epoch, or the one of the summary.

    Raises:
        Dead: there is none.
    """
    summary = runs.read_summary(folder)
    logged = [value for value in column(folder, metric) if math.isfinite(value)]
    flat = {k: v for name in ("final", "test") for k, v in (summary.get(name) or {}).items()}
    value = summary.get(metric) if metric in FROM_SUMMARY else flat.get(metric)
    if logged and metric not in FROM_SUMMARY:
        value = max(logged) if mode == "max" else min(logged)
    if not isinstance(value, int | float):
        known = ", ".join(sorted(flat)) or "no metric"
        raise Dead(f"the run has no {metric}: was nothing validated? It has {known}", hopeless=True)
    if not math.isfinite(value):
        raise Dead(f"{metric} is {value}", diverged=True)
    return float(value)


def outcome(parts: Mapping[str, Sequence[float]]) -> tuple[list[float], dict[str, Any]]:
    """The values of a trial, of each objective the mean over its parts, and what its study records beside them."""
    values = [statistics.fmean(column) for column in zip(*parts.values(), strict=True)]
    if len(parts) == 1:
        return values, {}
    first = {label: own[0] for label, own in parts.items()}
    return values, {"parts": first, "deviation": statistics.stdev(first.values())}


def column(folder: Path, metric: str) -> list[float]:
    """The values of one column of a run's metrics.csv; none where it has no such column yet."""
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
    except (OSError, ValueError):
        return []


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"
