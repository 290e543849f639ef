"""`boltlab sweep`: trainings whose values a sampler chooses and a pruner ends, until there are enough.

The same command again goes on with the sweep: with what was at work when it was stopped or killed, then up to the
number of trials that is asked for now. Beside one that is running, on any machine that sees its storage, it helps.
"""

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from boltlab import launch, machine, runs, signals, world
from boltlab.check import ConfigError, Mistake, process_count
from boltlab.commands import launched, train
from boltlab.config import Composed, build, compose, split_overrides, split_space
from boltlab.credentials import masked
from boltlab.errors import UserError
from boltlab.exits import exit_code
from boltlab.launchers import process
from boltlab.sweeps import space as spaces
from boltlab.sweeps import study as studies
from boltlab.sweeps.study import ASKED, URL, Study
from boltlab.sweeps.worker import FROM_SUMMARY, Part, Worker

TRIALS = 20  # where their number is not given
_composing = threading.Lock()  # Hydra has one global state


def main(overrides: list[str]) -> int:
    """Returns 0 where all trials that were asked for have come to an end, and one of them well."""
    with signals.caught():
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    launch.ready()  # what the trials are forked from gets its imports while this process has its own
    own, for_trials = split_overrides("sweep", overrides)
    options = compose("sweep", own).config
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("boltlab sweep needs the package optuna: pip install 'boltlab[sweep]'") from None
    sweep: studies.Sweep = build(options, "sweep")
    fixed, space = _space(sweep, for_trials)
    parts = _parts(options.seeds, options.folds, fixed)
    if not space and len(parts) == 1:
        cure = "give a key several values, optimizer.lr='tag(log,interval(1e-4,1e-1))', or sweep=…, seeds=…, folds=…"
        raise ConfigError([Mistake("sweep", f"has nothing to try: {cure}")])
    dimensions = spaces.parse(space)
    fixed = [*(["test=false"] if not any(text.startswith("test=") for text in fixed) else []), *fixed]
    fixed.append(f"log_dir={options.log_dir}")
    if "latency_ms" in (sweep.objectives or {}):
        fixed.append("++callbacks.latency._target_=boltlab.callbacks.latency.Latency")
    base = _check(fixed, dimensions, parts, sweep)
    auto = launched.at_auto(base)
    launcher = _launcher(base)
    fixed = [text for text in fixed if not launched.names_launcher(text)]
    asked = {
        "name": str(options.name or _choice(own)),
        "train": fixed,
        "space": space,
        "objectives": _objectives(sweep, dimensions, base, options),
        "sampler": OmegaConf.to_container(options.sampler),
        "pruner": OmegaConf.to_container(options.pruner),
        "parts": [[part.label, list(part.overrides)] for part in parts],
        "seed": base.config.seed,
        "auto": None if any(d.key in (*machine.KEYS, "experiment", "debug") for d in dimensions) else auto,
        "storage": options.storage and masked(options.storage),
    }
    if sweep.engine == "wandb":
        from boltlab.sweeps import wandb_engine

        wandb_engine.refuse(asked, dimensions, options.storage, launcher)
        agents = options.workers if isinstance(options.workers, int) else 1
        return wandb_engine.run(wandb_engine.sweep_config(asked, dimensions, sweep.trials), base.config, agents)
    top = studies.newest(Path(options.log_dir), asked)
    if top is None:
        top = runs.new_folder(options.log_dir, "train", asked["name"])
    before = runs.read_json(top / ASKED)
    trials = sweep.trials or (None if asked["sampler"]["_target_"] == studies.GRID else TRIALS)
    how_long = {"trials": trials, "timeout_minutes": sweep.timeout_minutes}
    begun = {"started": before.get("started", time.time()), "command": [masked(text) for text in overrides]}
    runs.write_json(top / ASKED, {"of": studies.definition(asked), **how_long, **begun, "asked": asked})
    print(f"{runs.shown(top)}{' goes on' if before else ''}", flush=True)
    study = Study(top, asked, trials, options.storage, key=_key(top))
    if launcher is not None:
        _launch(launcher, study, options)
        if not getattr(launcher, "wait", True):
            return 0
    else:
        _work(study, parts, _places(base, options.workers, study), sweep.timeout_minutes, live=True)
    return _end(study)


def _space(sweep: studies.Sweep, for_trials: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides that all trials share, and the space. The command line comes before the file, and of a key that
    stands twice the last counts."""
    shared: list[str] = []
    space = dict(sweep.space)
    for text in [*sweep.train, *for_trials]:
        key, value = text.lstrip("+").partition("=")[::2]
        (_, several), from_file = split_space([text]), text in sweep.train
        if several:
            space[key] = value
        elif not (from_file and key in sweep.space):
            shared.append(text)
            space.pop(key, None)
            for child, spec in list(space.items()):
                parent, _, values = str(spec.get("when", "") if isinstance(spec, dict) else "").partition("=")
                if parent == key and value in values.split(","):
                    space[child] = spec["values"]
                elif parent == key:
                    del space[child]
    return [text for text in shared if text.partition("=")[0].lstrip("+") not in space], space


def _choice(own: list[str]) -> str:
    chosen = next((text.partition("=")[2] for text in reversed(own) if text.startswith("sweep=")), "none")
    return "sweep" if chosen == "none" else chosen


def _parts(seeds: int, folds: int | None, fixed: list[str]) -> list[Part]:
    """The runs of a trial: each seed with each fold."""
    first = int(next((text.partition("=")[2] for text in reversed(fixed) if text.startswith("seed=")), "0"))
    by_seed = [(f"seed{s}", [f"seed={s}"]) for s in range(first, first + seeds)] if seeds > 1 else [("", [])]
    by_fold = [(f"fold{f}", [f"data.folds={folds}", f"data.fold={f}"]) for f in range(folds)] if folds else [("", [])]
    return [Part("-".join(filter(None, (a, b))), [*s, *f]) for a, s in by_seed for b, f in by_fold]


def _check(fixed: list[str], space: list[spaces.Dimension], parts: list[Part], sweep: studies.Sweep) -> Composed:
    """Composes the trainings with every choice and both ends of every number once; returns the first.

    Raises:
        ConfigError: with the mistakes of all; nothing was started.
    """
    found: list[Composed] = []
    mistakes: list[Mistake] = []
    points = [[*fixed, *spaces.overrides(point), *parts[0].overrides] for point in spaces.samples(space)]
    logged = [m for m in sweep.objectives or {} if m not in FROM_SUMMARY]
    points += [[*points[0], f"monitor={metric}"] for metric in logged]
    for texts in points:
        try:
            found.append(compose("train", texts))
        except ConfigError as e:
            mistakes += e.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    train.settle_weights(found[0])
    return found[0]


def _objectives(sweep: studies.Sweep, space: list[spaces.Dimension], base: Composed, options: Any) -> dict[str, str]:
    found: dict[str, str] = dict(sweep.objectives or {base.config.monitor: base.config.mode})
    pruner = options.pruner._target_.rpartition(".")[2]
    if len(found) > 1 and pruner != "NopPruner":
        raise ConfigError([Mistake("pruner", f"cannot compare trials by {len(found)} objectives: pruner=none")])
    if len(found) > 1 and options.sampler._target_.endswith("CmaEsSampler"):
        raise ConfigError([Mistake("sampler=cmaes", "has one objective: sampler=tpe, gp, random, grid or qmc")])
    if options.sampler._target_ == studies.GRID:
        endless = [d.key for d in space if d.size() == float("inf")]
        if endless:
            cure = "give choice(…), range(start,stop,step) or int(interval(…)), or another sampler"
            raise ConfigError([Mistake("sampler=grid", f"{', '.join(endless)} has endless values: {cure}")])
    return found


def _launcher(base: Composed) -> Any:
    if base.config.launcher is not None and process_count(base.config) > 1:
        mistake = Mistake("launcher", "a worker trains each trial in one process: trainer.devices=1, or no launcher")
        raise ConfigError([mistake])
    return launched.take([base])


def _places(base: Composed, workers: Any, study: Study) -> list[process.Place]:
    devices = base.config.trainer.get("devices", 1)
    devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
    groups = process.gpu_groups(devices, base.config.trainer.get("accelerator", "auto"))
    return process.places(groups, workers, most=study.total * len(study.asked["parts"]))


def _key(top: Path) -> str:
    """Empty for the first process at work on a sweep, so that alone it repeats itself; others draw other samples."""
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


def _begin(overrides: list[str], folder: Path, auto: list[str] | None = None) -> None:
    """Makes the run of a trial, whole and checked, for a process to begin it."""
    with _composing:
        job = compose("train", overrides)
        train.settle_weights(job)
        job.config.pop("launcher", None)
        launched.queue(job, folder, train.name_of(job), auto)


def _work(
    study: Study, parts: list[Part], places: list[process.Place], minutes: float | None, live: bool = False
) -> None:
    from boltlab.sweeps.table import Table

    deadline = time.time() + 60 * minutes if minutes else None
    table = Table(study, len(places), live)
    begin = partial(_begin, auto=study.asked["auto"])
    worker = Worker(study, parts, places, begin, world.function_name(train.job), deadline, table.say)
    with table.shown(worker.at_work):
        worker.run(table.update)


def _launch(launcher: Any, study: Study, options: Any) -> None:
    """Has the launcher start workers, each a job of its own, for the same study."""
    if options.storage and options.storage != "journal":
        os.environ[URL] = options.storage
    wanted = options.workers if isinstance(options.workers, int) else 2
    folders = sorted((study.top / "workers").glob("*"), key=lambda folder: int(folder.name))
    status = dict(zip(folders, launched.statuses(list(folders)), strict=True))
    watch = [folder for folder in folders if status[folder] in runs.AT_WORK]
    start = []
    for number in range(len(folders), len(folders) + max(0, wanted - len(watch))):
        folder = study.top / "workers" / str(number)
        folder.mkdir(parents=True)
        runs.write_summary(folder, status="queued", started=time.time(), pid=os.getpid(), host=runs.platform.node())
        start.append(folder)
    launcher.run(study.top, start, watch, world.function_name(work))


def work(folder: Path) -> int:
    """What a worker's job does: trials of the sweep that its folder stands in; returns the exit code."""

    def command() -> int:
        top = folder.parents[1]
        content = runs.read_json(top / ASKED)
        asked = content["asked"]
        parts = [Part(label, texts) for label, texts in asked["parts"]]
        with signals.caught(), runs.lock(folder), runs.recorded(folder):
            runs.write_summary(folder, status="running", pid=os.getpid(), host=runs.platform.node(), reason=None)
            url = os.environ.get(URL) or ("journal" if asked["storage"] == "journal" else None)
            study = Study(top, asked, content["trials"], url, key=folder.name)
            begun = content["started"]
            minutes = content["timeout_minutes"]
            left = None if minutes is None else max(0.001, minutes - (time.time() - begun) / 60)
            with _composing:
                base = compose("train", [*asked["train"], *parts[0].overrides], check=False)
            _work(study, parts, _places(base, 1, study), left)
            runs.end(folder, status="finished")
        return 0

    return exit_code("sweep", command)


def _end(study: Study) -> int:
    """Says what was found, and writes it: the best config as an experiment, the report."""
    from boltlab.sweeps import report

    trials = study.trials()
    done = sum(map(studies.counts, trials))
    at_work = [t.number for t in trials if t.state.name == "RUNNING"]
    good = [t for t in trials if t.state.name == "COMPLETE"]
    if not good:
        reasons = [f"trial {t.number}: {t.user_attrs['reason']}" for t in trials if "reason" in t.user_attrs]
        raise UserError("\n".join([f"no trial of {runs.shown(study.top)} came to its end", *reasons[:5]]))
    report.write(study)
    report.show(study)
    if at_work:
        print(f"{len(at_work)} trials are at work elsewhere: {', '.join(map(str, at_work))}")
    elif done < study.total:
        print(f"{done} of {study.total} trials; the same command goes on")
    return 0
