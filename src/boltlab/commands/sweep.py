"""`boltlab sweep`: trainings whose values a sampler chooses and a pruner ends, until there are enough.

The same command again goes on with the sweep: with what was at work when it was stopped or killed, then up to the
number of trials that is asked for now. Beside one that is running, on any machine that sees its storage, it helps.
"""

import math
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from boltlab import runs
from boltlab.config.build import build
from boltlab.config.compose import Composed, compose
from boltlab.config.devices import process_count
from boltlab.config.modes import settle
from boltlab.config.overrides import split_overrides, split_space, sweep_values
from boltlab.ground import signals
from boltlab.ground.credentials import masked
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.processes import launch, rendezvous
from boltlab.processes import submit as launched
from boltlab.processes.exits import exit_code
from boltlab.processes.launchers import process
from boltlab.sweeps import space as spaces
from boltlab.sweeps import study as studies
from boltlab.sweeps.study import ASKED, URL, Study
from boltlab.sweeps.worker import FROM_SUMMARY, Part, Worker
from boltlab.training import start as training

TRIALS = 20  # where their number is not given
_composing = threading.Lock()  # Hydra has one global state


def main(overrides: list[str]) -> int:
    """Returns 0 where a trial has come to its end; what is missing, at the time limit or elsewhere, is said."""
    with signals.caught():
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    if "sweep.engine=vectorized" not in overrides:
        launch.ready()  # what the trials are forked from gets its imports while this process has its own
    own, for_trials = split_overrides("sweep", overrides)
    options = compose("sweep", own).config
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("boltlab sweep needs the package optuna: pip install 'boltlab[sweep]'") from None
    sweep: studies.Sweep = build(options, "sweep")
    fixed, space = _space(sweep, for_trials)
    if not space and options.seeds == 1 and options.folds is None:
        cure = "give a key several values, optimizer.lr='tag(log,interval(1e-4,1e-1))', or sweep=…, seeds=…, folds=…"
        raise ConfigError([Mistake("sweep", f"has nothing to try: {cure}")])
    dimensions = spaces.parse(space)
    fixed = [*(["test=false"] if not any(text.startswith("test=") for text in fixed) else []), *fixed]
    fixed.append(f"log_dir={options.log_dir}")
    if "latency_ms" in (sweep.objectives or {}):
        fixed.append("++callbacks.latency._target_=boltlab.callbacks.latency.Latency")
    _refuse(fixed, space, options)
    samples, objectives = _check(fixed, dimensions, [], sweep)
    base = samples[0]
    parts = _parts(options.seeds, options.folds, int(base.config.seed))
    if parts[0].overrides:
        base = _check(fixed, dimensions, list(parts[0].overrides), sweep)[0][0]
    launcher = _launcher(base)
    fixed = [text for text in fixed if not launched.names_launcher(text)]
    asked = {
        "name": str(options.name or _choice(own)),
        "train": fixed,
        "space": space,
        "objectives": _objectives(objectives, dimensions, base, options),
        "sampler": OmegaConf.to_container(options.sampler),
        "pruner": OmegaConf.to_container(options.pruner),
        "parts": [[part.label, list(part.overrides)] for part in parts],
        "seed": base.config.seed,
        "storage": options.storage and masked(options.storage),
        "validations": _validations(base),
    }
    if sweep.engine == "wandb":
        from boltlab.sweeps import wandb_engine

        wandb_engine.refuse(asked, dimensions, options.storage, launcher, sweep.timeout_minutes)
        agents = options.workers if isinstance(options.workers, int) else 1
        total = sweep.trials or (None if asked["sampler"]["_target_"] == studies.GRID else TRIALS)
        return wandb_engine.run(wandb_engine.sweep_config(asked, dimensions, total), base.config, agents)
    if sweep.engine == "vectorized":
        from boltlab.sweeps import vectorized

        if mistakes := vectorized.refuse(samples, asked, options.folds, launcher):
            raise ConfigError(mistakes)
    whole = asked["sampler"]["_target_"] == studies.GRID and spaces.size(dimensions) < float("inf")
    trials = sweep.trials or (None if whole else TRIALS)
    how_long = {"trials": trials, "timeout_minutes": sweep.timeout_minutes}
    command = [masked(text) for text in overrides]
    top, goes_on = studies.begin(Path(options.log_dir), asked, {**how_long, "command": command})
    study = Study(top, asked, trials, options.storage, key=_key(top))
    if goes_on and _is_done(study):
        done = f"all trials of this command are done ({study.total})"
        print(f"{done}, nothing runs; another name=… begins a new sweep", flush=True)
        return _end(study)
    print(f"{runs.shown(top)}{' goes on' if goes_on else ''}", flush=True)
    if launcher is not None:
        _launch(launcher, study, options)
        if not getattr(launcher, "wait", True):
            return 0
    elif sweep.engine == "vectorized":
        at_once = options.workers if isinstance(options.workers, int) else vectorized.AT_ONCE
        deadline = time.time() + 60 * sweep.timeout_minutes if sweep.timeout_minutes else None
        vectorized.Vectorized(study, parts, at_once, training.name_of, deadline).run()
    else:
        _work(study, parts, _places(base, options.workers, study), sweep.timeout_minutes, live=True)
    return _end(study)


def _space(sweep: studies.Sweep, for_trials: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides that all trials share, and the space. The command line comes before the file, and of a key that
    stands twice the last counts."""
    shared: list[str] = []
    space = dict(sweep.space)
    for text in [*sweep.train, *for_trials]:
        key, value = text.partition("=")[::2]
        if split_space([text])[1]:
            space = {k: spec for k, spec in space.items() if _bare(k) != _bare(key)} | {key: value}
            with suppress(ValueError):  # `parse` lists it
                _narrow(space, key, sweep_values(key, value).texts)
        elif text in for_trials or _bare(key) not in map(_bare, sweep.space):
            shared.append(text)
            space = {k: spec for k, spec in space.items() if _bare(k) != _bare(key)}
            _narrow(space, key, (value,), fixed=True)
    return [text for text in shared if _bare(text.partition("=")[0]) not in map(_bare, space)], space


def _bare(key: str) -> str:
    return key.lstrip("+")


def _narrow(space: dict[str, Any], key: str, values: tuple[str, ...], fixed: bool = False) -> None:
    """Fits what depends on a key to the values that the command line leaves to it, in place."""
    for child, spec in list(space.items()):
        if not isinstance(spec, dict) or "when" not in spec or spaces.condition_of(spec["when"])[0] != _bare(key):
            continue
        possible = [value for value in spaces.condition_of(spec["when"])[1] if value in values]
        if not possible:
            del space[child]
        elif fixed:
            space[child] = {name: part for name, part in spec.items() if name != "when"}
        else:
            space[child] = {**spec, "when": f"{key}={','.join(possible)}"}


def _choice(own: list[str]) -> str:
    chosen = next((text.partition("=")[2] for text in reversed(own) if text.startswith("sweep=")), "none")
    return "sweep" if chosen == "none" else chosen


def _parts(seeds: int, folds: int | None, first: int) -> list[Part]:
    """The runs of a trial: each seed with each fold."""
    by_seed = [(f"seed{s}", [f"seed={s}"]) for s in range(first, first + seeds)] if seeds > 1 else [("", [])]
    by_fold = [(f"fold{f}", [f"data.folds={folds}", f"data.fold={f}"]) for f in range(folds)] if folds else [("", [])]
    return [Part("-".join(filter(None, (a, b))), [*s, *f]) for a, s in by_seed for b, f in by_fold]


def _refuse(fixed: list[str], space: dict[str, Any], options: Any) -> None:
    """
    Raises:
        ConfigError: what is asked for twice, or would mean something else in each trial.
    """
    mistakes = []
    if options.seeds > 1 and "seed" in map(_bare, space):
        mistakes.append(Mistake("seeds", "trains each point with several seeds, and seed is a key of the space"))
    if options.folds and {"data.fold", "data.folds"} & set(map(_bare, space)):
        mistakes.append(Mistake("folds", "trains each point on every fold, and the space names some"))
    if "init_from=latest" in fixed or "latest" in str(space.get("init_from", "")):
        mistakes.append(
            Mistake("init_from=latest", "is another trial of this sweep in all trials but one: name the run")
        )
    if any(text.startswith("resume=") and text != "resume=null" for text in fixed):
        mistakes.append(Mistake("resume", "goes on with one run; the same sweep command goes on with a sweep"))
    if mistakes:
        raise ConfigError(mistakes)


def _check(
    fixed: list[str], space: list[spaces.Dimension], more: list[str], sweep: studies.Sweep
) -> tuple[list[Composed], dict[str, str]]:
    """Composes the trainings with every choice and both ends of every number once, and with each objective as the
    monitor; returns them, and the objectives, each to be max or min.

    Raises:
        ConfigError: with the mistakes of all; nothing was started.
    """
    found: list[Composed] = []
    mistakes: list[Mistake] = []
    points = [[*fixed, *spaces.overrides(point), *more] for point in spaces.samples(space)]
    if more:
        points = points[:1]  # the rest was checked without
    for texts in points:
        try:
            found.append(compose("train", texts))
        except ConfigError as e:
            mistakes += e.mistakes
    objectives: dict[str, str] = dict(sweep.objectives or {})
    for metric, mode in objectives.items():
        if metric in FROM_SUMMARY:
            objectives[metric], wrong = settle(f"sweep.objectives.{metric}", mode, metric, FROM_SUMMARY)
            mistakes += wrong
            continue
        try:
            found.append(compose("train", [*points[0], f"monitor={metric}", f"mode={mode}"]))
            objectives[metric] = found[-1].config.mode
        except ConfigError as e:
            mistakes += [_of_objective(metric, mistake) for mistake in e.mistakes]
    if mistakes:
        raise ConfigError(mistakes)
    training.settle_weights(found[0])
    return found, objectives


def _of_objective(metric: str, mistake: Mistake) -> Mistake:
    """One of a training that has the objective as its monitor, in the words of the sweep."""
    if not mistake.where.startswith("mode="):
        return mistake
    return Mistake(*(text.replace("mode=", f"sweep.objectives.{metric}=") for text in (mistake.where, mistake.message)))


def _validations(base: Composed) -> int:
    """How often a training is validated at most: so many steps of the pruner are a part's."""
    limits = base.config.trainer
    each, interval = limits.get("check_val_every_n_epoch") or 1, limits.get("val_check_interval")
    a_time = math.ceil(1 / interval) if isinstance(interval, float) and 0 < interval < 1 else 1
    epochs = limits.max_epochs if isinstance(limits.max_epochs, int) and limits.max_epochs > 0 else 1000
    return max(1, epochs // each * a_time)


def _objectives(found: dict[str, str], space: list[spaces.Dimension], base: Composed, options: Any) -> dict[str, str]:
    found = found or {base.config.monitor: base.config.mode}
    pruner = options.pruner._target_.rpartition(".")[2]
    if len(found) > 1 and pruner != "NopPruner":
        raise ConfigError([Mistake("pruner", f"cannot compare trials by {len(found)} objectives: pruner=none")])
    if len(found) > 1 and options.sampler._target_.endswith("CmaEsSampler"):
        raise ConfigError([Mistake("sampler=cmaes", "has one objective: sampler=tpe, gp, random, grid or qmc")])
    for metric, missing in (
        ("latency_ms", process_count(base.config) > 1 and "is measured in trainings of one process: trainer.devices=1"),
        (
            "samples_per_second",
            not any("Throughput" in str(node) for node in (base.config.callbacks or {}).values())
            and "is counted by a callback that is not there: callbacks=[default,…]",
        ),
    ):
        if metric in found and missing:
            raise ConfigError([Mistake(f"sweep.objectives.{metric}", str(missing))])
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


def _places(base: Composed, workers: Any, study: Study, threads: int | Literal["auto"] = "auto") -> list[process.Place]:
    devices = base.config.trainer.get("devices", 1)
    devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
    groups = process.gpu_groups(devices, base.config.trainer.get("accelerator", "auto"))
    most, ranks = study.total * len(study.asked["parts"]), process_count(base.config)
    found = process.places(groups, workers, threads, most=most)
    return [process.Place(place.gpus, max(1, place.threads // ranks)) for place in found]


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


def _begin(overrides: list[str], folder: Path) -> None:
    """Makes the run of a trial, whole and checked, for a process of this machine to begin it."""
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
    worker = Worker(study, parts, places, _begin, rendezvous.function_name(training.job), deadline, table.say)
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
        runs.write_summary(folder, status="queued", started=time.time(), pid=os.getpid(), host=platform.node())
        start.append(folder)
    launcher.run(study.top, start, watch, rendezvous.function_name(work))


def work(folder: Path) -> int:
    """What a worker's job does: trials of the sweep that its folder stands in; returns the exit code."""

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
    """Says what was found, and writes it: the best config as an experiment, the report."""
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
        print(f"{done} of {study.total} trials; the same command goes on")
    return 0
