"""`boltlab sweep`: a sampler chooses the values of trainings and a pruner ends the poor ones, until there are enough.

The same command again resumes the sweep: first the trials that were running when it was stopped or killed, then new
ones up to the number now asked for. While another command runs the sweep, on any machine that sees its storage, it
helps.
"""

import math
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config.compose import Composed, compose
from boltlab.config.devices import process_count
from boltlab.config.overrides import split_overrides
from boltlab.ground import signals
from boltlab.ground.credentials import masked
from boltlab.ground.errors import ConfigError, UserError
from boltlab.processes import several
from boltlab.processes import submit as launched
from boltlab.processes.exits import exit_code
from boltlab.processes.launchers import process
from boltlab.sweeps import space as spaces
from boltlab.sweeps import spec as specs
from boltlab.sweeps import study as studies
from boltlab.sweeps.spec import Spec
from boltlab.sweeps.study import ASKED, URL, Study
from boltlab.sweeps.worker import Part, Worker
from boltlab.training import start as training

TRIALS = 20  # where their number is not given
_composing = threading.Lock()  # Hydra has one global state


def main(overrides: list[str]) -> int:
    """Returns 0 if a trial has finished; prints how many are missing, after the time limit or elsewhere."""
    with signals.caught():
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    if "sweep.engine=vectorized" not in overrides:
        several.ready()  # the process that trials are forked from imports while this one does
    own, for_trials = split_overrides("sweep", overrides)
    options = compose("sweep", own).config
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("boltlab sweep needs the package optuna: pip install 'boltlab[sweep]'") from None
    spec = specs.read(own, for_trials, options)
    if spec.sweep.engine == "wandb":
        return _run_on_server(spec)
    if spec.sweep.engine == "vectorized":
        from boltlab.sweeps import stackable

        if mistakes := stackable.refuse(spec.samples, spec.asked, options.folds, spec.launcher):
            raise ConfigError(mistakes)
    return _run(spec, [masked(text) for text in overrides])


def first(overrides: list[str]) -> tuple[DictConfig, str]:
    """The config of the first training, of which only keys and choices are checked, and how many points there are; of a
    sweep that tries nothing its own config."""
    own, for_trials = split_overrides("sweep", overrides)
    options = compose("sweep", own, check=False).config
    composed, points = specs.first(options, for_trials)
    count = f"{points:,}" if points < math.inf else "endless"
    return (composed.config, f"the first of {count} points") if points > 1 else (options, "")


def _run_on_server(spec: Spec) -> int:
    from boltlab.sweeps import wandb_engine

    sweep, asked = spec.sweep, spec.asked
    wandb_engine.refuse(asked, spec.dimensions, spec.options.storage, spec.launcher, sweep.timeout_minutes)
    total = sweep.trials or (None if spec.is_grid else TRIALS)
    config = wandb_engine.sweep_config(asked, spec.dimensions, total)
    return wandb_engine.run(config, spec.samples[0].config, spec.workers(1))


def _run(spec: Spec, command: list[str]) -> int:
    sweep, options, asked = spec.sweep, spec.options, spec.asked
    whole = spec.is_grid and spaces.size(spec.dimensions) < math.inf
    trials = sweep.trials or (None if whole else TRIALS)
    more = {"trials": trials, "timeout_minutes": sweep.timeout_minutes, "command": command}
    top, goes_on = studies.begin(Path(options.log_dir), asked, more)
    if (key := _key(top)) and options.rebuild:
        raise UserError(f"rebuild=true: another command is at work on {runs.shown(top)}")
    study = Study(top, asked, trials, options.storage, key, anew=options.rebuild)
    if goes_on and _is_done(study):
        done = f"all trials of this command are done ({study.total})"
        print(f"{done}, nothing runs; another name=… begins a new sweep", flush=True)
        return _end(study)
    print(f"{runs.shown(top)}{' resumes' if goes_on else ''}", flush=True)
    if spec.launcher is not None:
        _launch(spec.launcher, study, options.storage, spec.workers(2))
        if not getattr(spec.launcher, "wait", True):
            return 0
    elif sweep.engine == "vectorized":
        from boltlab.sweeps import vectorized

        deadline = time.time() + 60 * sweep.timeout_minutes if sweep.timeout_minutes else None
        at_once = spec.workers(vectorized.AT_ONCE)
        vectorized.Vectorized(study, spec.parts, at_once, training.name_of, deadline).run()
    else:
        places = _places(spec.samples[0], options.workers, study)
        _work(study, spec.parts, places, sweep.timeout_minutes, live=True)
    return _end(study)


def _places(base: Composed, workers: Any, study: Study, threads: int | Literal["auto"] = "auto") -> list[process.Place]:
    devices = base.config.trainer.get("devices", 1)
    devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
    groups = process.gpu_groups(devices, base.config.trainer.get("accelerator", "auto"))
    most, ranks = study.total * len(study.asked["parts"]), process_count(base.config)
    found = process.places(groups, workers, threads, most=most)
    return [process.Place(place.gpus, max(1, place.threads // ranks)) for place in found]


def _key(top: Path) -> str:
    """Empty for the first process of a sweep, which alone draws the same samples again; others draw other samples."""
    from filelock import FileLock, Timeout

    (top / "claims").mkdir(exist_ok=True)
    lock = FileLock(top / "claims" / "first", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return f"{os.getpid()} {time.time()}"
    _held.append(lock)  # until this process ends
    return ""


_held: list[Any] = []


def _begin(overrides: list[str], folder: Path) -> None:
    """Makes the checked run folder of a trial; a process of this machine trains it."""
    with _composing:
        job = compose("train", overrides)
        training.settle_weights(job)
        launched.queue(job, folder, training.name_of(job), auto=())


def _work(
    study: Study,
    parts: list[Part],
    places: list[process.Place],
    minutes: float | None,
    begun: float | None = None,
    live: bool = False,
) -> None:
    from boltlab.sweeps.table import Table

    deadline = (begun or time.time()) + 60 * minutes if minutes else None
    table = Table(study, len(places), live)
    worker = Worker(study, parts, places, _begin, training.JOB, deadline, table.say)
    with table.shown(worker.at_work):
        worker.run(table.update)


def _launch(launcher: Any, study: Study, storage: str | None, wanted: int) -> None:
    """Has the launcher start workers, each a job of its own, for the same study."""
    if storage and storage != "journal":
        os.environ[URL] = storage
    folders = sorted((study.top / "workers").glob("*"), key=lambda folder: int(folder.name))
    status = dict(zip(folders, launched.statuses(list(folders)), strict=True))
    watch = [folder for folder in folders if status[folder].at_work]
    start = []
    for number in range(len(folders), len(folders) + max(0, wanted - len(watch))):
        folder = study.top / "workers" / str(number)
        folder.mkdir(parents=True)
        runs.write_summary(folder, status="queued", started=time.time(), pid=os.getpid(), host=platform.node())
        start.append(folder)
    launcher.run(study.top, start, watch, f"{__name__}:work")


def work(folder: Path) -> int:
    """Entry point of a worker's job: trains trials of the sweep that contains its folder; returns the exit code."""

    def command() -> int:
        top = folder.parents[1]
        content = runs.read_json(top / ASKED)
        asked = content["asked"]
        parts = [Part(label, texts) for label, texts in asked["parts"]]
        with signals.caught(), runs.lock(folder), runs.recorded(folder):
            begun = runs.read_summary(folder).get("begun") or time.time()  # a job that is requeued has begun before
            here = {"pid": os.getpid(), "host": platform.node(), "begun": begun}
            runs.write_summary(folder, status="running", reason=None, **here)
            url = os.environ.get(URL)
            if url is None and asked["storage"] not in (None, "journal"):
                raise UserError(f"the variable {URL}, with the URL of the study, did not come to this job")
            study = Study(top, asked, content["trials"], url or asked["storage"], key=folder.name)
            with _composing:
                point = spaces.overrides(next(spaces.samples(study.space)))
                base = compose("train", [*asked["train"], *point, *parts[0].overrides], check=False)
            given = os.environ.get("OMP_NUM_THREADS", "")
            places = _places(base, 1, study, int(given) if given.isdigit() else "auto")
            _work(study, parts, places, content["timeout_minutes"], begun)
            runs.end(folder, status="finished")
        return 0

    return exit_code("sweep", command)


def _is_done(study: Study) -> bool:
    known = study.trials()
    return all(t.state.is_finished() for t in known) and sum(map(studies.counts, known)) >= study.total


def _end(study: Study) -> int:
    """Prints the results and writes them: the best config as an experiment, and the report."""
    from boltlab.sweeps import report

    trials = study.trials()
    done = sum(studies.counts(t) and t.state.is_finished() for t in trials)
    at_work = [t.number for t in trials if t.state.name == "RUNNING" and t.user_attrs.get("at") is not None]
    good = [t for t in trials if t.state.name == "COMPLETE"]
    if not good:
        reasons = [f"trial {t.number}: {t.user_attrs['reason']}" for t in trials if "reason" in t.user_attrs]
        said = sorted((study.top / "workers").glob(f"*/{process.OUTPUT}"))
        reasons = reasons[:5] + [f"see {', '.join(str(runs.shown(path)) for path in said[:3])}"] * bool(said)
        raise UserError("\n".join([f"no trial of {runs.shown(study.top)} came to its end", *reasons]))
    report.write(study)
    report.show(study)
    if at_work:
        print(f"{len(at_work)} trials are at work elsewhere: {', '.join(map(str, at_work))}")
    elif done < study.total:
        print(f"{done} of {study.total} trials; the same command resumes")
    return 0
