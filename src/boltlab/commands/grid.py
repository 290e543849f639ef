"""`boltlab train -m`: trains once for each combination of the values; the same command again runs only what is missing.

logs/train/<date>_<time>_sweep_<name>-<id>/
    jobs.json      the command, and of each job: overrides, hash of its config, status, best value, reason, run folder
    0/ 1/ 1-2/ …   the run folders; 1-2 is the second start of job 1
"""

import hashlib
import math
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config.compose import Composed, compose
from boltlab.config.overrides import MOST_JOBS, grid, job_count
from boltlab.ground import credentials, signals
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.ground.texts import line, print_table
from boltlab.processes import submit as launched
from boltlab.training import start as training

# What a job may be besides the states of a run.
BEFORE = "finished before"


def main(overrides: list[str]) -> int:
    """Runs the grid; returns 0 if every job has finished.

    The newest sweep whose jobs are these ones, each with the config that is composed now, is resumed; where all of them
    are finished, it is only shown. The code may be another one: what made jobs fail is often mended there, and each run
    records its commit.

    Raises:
        ConfigError: with the mistakes of all jobs; none was started.
        UserError: another process is at work on this sweep.
    """
    with signals.caught():
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    overrides = _bounded(overrides)
    whole = compose("train", overrides, sweep=True)
    overrides = whole.overrides
    training.say_unused(whole)
    jobs = _compose_all(grid(overrides))
    launcher = launched.take(jobs)
    known = [{"overrides": job.overrides, "config": _hash(job)} for job in jobs]
    top = runs.newest_sweep(Path(whole.config.log_dir), "jobs.json", lambda content: _jobs_of(content) == known)
    if top is None:
        top = runs.new_folder(whole.config.log_dir, "train", f"sweep_{training.name_of(whole)}")
    elif len((sweep := _Sweep(top, overrides, jobs, known, launcher)).before) == len(jobs):
        done = f"all jobs of this command are finished ({len(jobs)})"
        print(f"{done}, nothing runs; another name=… begins a new sweep", flush=True)
        sweep.show(sweep.rows())
        return 0
    with runs.lock(top):
        return _Sweep(top, overrides, jobs, known, launcher).run()


def first(overrides: list[str]) -> tuple[DictConfig, str]:
    """The config of the first job, of which only keys and choices are checked, and how many jobs there are."""
    whole = compose("train", _bounded(overrides), sweep=True, check=False)
    jobs = grid(whole.overrides)
    return compose("train", jobs[0], check=False).config, f"the first of {len(jobs):,} jobs"


def _bounded(overrides: list[str]) -> list[str]:
    """The overrides without `max_jobs=`.

    Raises:
        ConfigError: they make more jobs than that, or it is no number.
    """
    rest = [text for text in overrides if not text.startswith("max_jobs=")]
    most = next((text for text in reversed(overrides) if text.startswith("max_jobs=")), f"max_jobs={MOST_JOBS}")
    number = most.partition("=")[2]
    if not number.isdecimal():
        raise ConfigError([Mistake(most, "takes int: how many jobs a grid may have")])
    if (count := job_count(rest)) > int(number):
        cure = f"fewer values, or max_jobs={count}" if count < math.inf else "a range with an end"
        raise ConfigError([Mistake("-m", f"makes {count:,} jobs, more than {int(number):,}: {cure}")])
    return rest


def _compose_all(combinations: list[list[str]]) -> list[Composed]:
    jobs: list[Composed] = []
    mistakes: list[Mistake] = []
    for combination in combinations:
        try:
            jobs.append(compose("train", combination))
            training.settle_weights(jobs[-1])
        except ConfigError as e:
            mistakes += e.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return jobs


def _hash(job: Composed) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(credentials.plain(job.config))).encode()).hexdigest()


def _jobs_of(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The jobs that a jobs.json holds, as `_main` compares them; None where it is not ours, or broken."""
    try:
        return [{key: job[key] for key in ("overrides", "config")} for job in content["jobs"]]
    except (KeyError, TypeError):
        return None


def _starts(top: Path, number: int) -> list[tuple[int, Path]]:
    """The run folders of a job, in order, each with the number of its start."""
    names = [(re.fullmatch(rf"{number}(?:-(\d+))?", folder.name), folder) for folder in top.iterdir()]
    return sorted((int(match[1] or 1), folder) for match, folder in names if match)


def _fresh(top: Path, number: int) -> Path:
    """A folder for a job that nothing of it stands in: a run that did not finish is never overwritten."""
    starts = _starts(top, number)
    return top / (f"{number}-{starts[-1][0] + 1}" if starts else str(number))


def _resumes(folder: Path, status: runs.Status) -> bool:
    """Whether a job resumes in its folder; one that was stopped before it was a run begins there again."""
    if status.resumable and not (begun := (folder / "config.yaml").is_file()):
        shutil.rmtree(folder)
    return status.resumable and begun


class _Sweep:
    """One sweep folder at work. What became of a job is read from its run folder, so that nothing can contradict it."""

    def __init__(
        self, top: Path, overrides: list[str], jobs: list[Composed], known: list[dict[str, Any]], launcher: Any
    ):
        self.top, self.overrides, self.jobs, self.known, self.launcher = top, overrides, jobs, known, launcher
        self.before = {n for n, status in enumerate(self.statuses()) if status == "finished"}
        self.reasons: dict[int, str] = {}
        same = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        self.titles = [" ".join(o for o in job.overrides if o not in same) for job in jobs]

    def run(self) -> int:
        if (self.top / "jobs.json").exists():
            done = f"{len(self.before)} of {len(self.jobs)} jobs are finished"
            print(f"{runs.shown(self.top)} resumes: {done} (another name=… begins a new sweep)", flush=True)
        self.write()
        try:
            if self.launcher is not None:
                self.launch()
            for number, job in enumerate(self.jobs if self.launcher is None else []):
                self.run_job(number, job)
        finally:  # also where Ctrl-C or a signal ends the sweep: what has not begun stands there as not started
            rows = self.rows()
            self.show(rows)
            self.write()
        leaves = not getattr(self.launcher, "wait", True)
        good = (
            row["status"] in ("finished", BEFORE) or (leaves and runs.Status(row["status"]).at_work) for row in rows
        )
        return 0 if all(good) else 1

    def folder(self, number: int) -> Path | None:
        """Where a job was begun last."""
        starts = _starts(self.top, number)
        return starts[-1][1] if starts else None

    def statuses(self) -> list[runs.Status]:
        return launched.statuses([self.folder(number) for number in range(len(self.jobs))])

    def launch(self) -> None:
        """Has the launcher start what is not finished, each in its folder; what is at work already is watched."""
        start, watch = [], []
        for number, status in enumerate(self.statuses()):
            folder = self.folder(number)
            if number in self.before:
                continue
            if status.at_work and folder is not None:
                watch.append(folder)
                continue
            if folder is None or not _resumes(folder, status):
                folder = _fresh(self.top, number)
                launched.queue(self.jobs[number], folder, training.name_of(self.jobs[number]))
            start.append(folder)
        if watch and not self.launcher.watches:
            print(f"another process is at work on job {', '.join(folder.name for folder in watch)}", flush=True)
        self.write()
        if start or watch:
            self.launcher.run(self.top, start, watch, training.JOB)

    def run_job(self, number: int, job: Composed) -> None:
        heading = f"job {number}  {self.titles[number]}"
        if number in self.before:
            print(f"{heading}: {BEFORE}", flush=True)
            return
        newest = self.folder(number)
        (status,) = launched.statuses([newest])
        if status.at_work:
            print(f"{heading}: another process is at work on it", flush=True)
            return
        print(f"\n{heading}", flush=True)
        try:
            with signals.heard():
                if newest is not None and _resumes(newest, status):
                    training.resume_run(newest, [text for text in job.overrides if "${oc.env:" in text])
                else:  # one that failed starts anew, and what it left stays as it is
                    training.run(job, _fresh(self.top, number))
            self.write()
        except UserError as e:
            self.failed(number, str(e))
        except Exception as e:
            print(credentials.masked(traceback.format_exc()), file=sys.stderr, end="")
            self.failed(number, f"{type(e).__name__}: {e}")

    def failed(self, number: int, reason: str) -> None:
        reason = credentials.masked(reason)
        print(f"job {number} failed: {reason.strip()}", flush=True)
        self.reasons[number] = " ".join(reason.split())[:500]

    def rows(self) -> list[dict[str, Any]]:
        """What `jobs.json` and the table say of each job."""
        return [self.row(number, status) for number, status in enumerate(self.statuses())]

    def row(self, number: int, status: str) -> dict[str, Any]:
        folder = self.folder(number)
        summary = runs.read_summary(folder) if folder else {}
        status = BEFORE if number in self.before else "failed" if number in self.reasons else status
        return {
            "job": number,
            **self.known[number],
            "status": status,
            "best": summary.get("best", {}).get(self.jobs[number].config.monitor),
            "reason": self.reasons.get(number) or summary.get("reason") or "",
            "folder": folder.name if folder else None,
        }

    def write(self) -> None:
        runs.write_json(self.top / "jobs.json", {"command": self.overrides, "jobs": self.rows()})

    def show(self, rows: list[dict[str, Any]]) -> None:
        from rich.text import Text

        monitors = dict.fromkeys(job.config.monitor for job in self.jobs)
        columns = ("job", "overrides", "status", f"best {', '.join(monitors)}", "reason", "folder")
        table = [
            (
                str(row["job"]),
                self.titles[row["job"]],
                Text(row["status"], runs.Status(row["status"].removesuffix(" before")).colour),
                "" if row["best"] is None else f"{row['best']:.4f}",
                line(row["reason"], 100),
                row["folder"] or "",
            )
            for row in rows
        ]
        print()
        print_table(columns, table)
        print(f"sweep folder  {runs.shown(self.top)}", flush=True)
