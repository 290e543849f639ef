"""A sweep as its command asks for it: what its trainings share and what they vary; all mistakes are found first."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from boltlab.config.build import build
from boltlab.config.compose import Composed, compose
from boltlab.config.devices import process_count
from boltlab.config.modes import settle
from boltlab.config.overrides import given, names_launcher, split_space, sweep_values
from boltlab.ground.credentials import masked
from boltlab.ground.errors import ConfigError, Mistake
from boltlab.processes import submit
from boltlab.sweeps import space as spaces
from boltlab.sweeps import study as studies
from boltlab.sweeps.worker import FROM_SUMMARY, Part


@dataclass(frozen=True)
class Spec:
    """A checked sweep; nothing is started. `asked`: its definition, as its file holds it."""

    options: Any
    sweep: studies.Sweep
    dimensions: list[spaces.Dimension]
    samples: list[Composed]
    parts: list[Part]
    launcher: Any
    asked: dict[str, Any]

    @property
    def is_grid(self) -> bool:
        return bool(self.asked["sampler"]["_target_"] == studies.GRID)

    def workers(self, otherwise: int) -> int:
        return self.options.workers if isinstance(self.options.workers, int) else otherwise


def read(own: list[str], for_trials: list[str], options: Any) -> Spec:
    """
    Raises:
        ConfigError: with the mistakes of the sweep and of all its trainings.
    """
    sweep: studies.Sweep = build(options, "sweep")
    fixed, space = _space(sweep, for_trials)
    if not space and options.seeds == 1 and options.folds is None:
        cure = "give a key several values, optimizer.lr='tag(log,interval(1e-4,1e-1))', or sweep=…, seeds=…, folds=…"
        raise ConfigError([Mistake("sweep", f"has nothing to try: {cure}")])
    dimensions = spaces.parse(space)
    fixed = [*_untested(fixed), *fixed, given("log_dir", options.log_dir)]
    if "latency_ms" in (sweep.objectives or {}):
        fixed.append("++callbacks.latency._target_=boltlab.callbacks.latency.Latency")
    _refuse(fixed, space, options)
    samples, objectives = _check(fixed, dimensions, [], sweep)
    base = samples[0]
    parts = _parts(options.seeds, options.folds, int(base.config.seed))
    if parts[0].overrides:
        base = _check(fixed, dimensions, list(parts[0].overrides), sweep)[0][0]
    launcher = _launcher(base)
    asked = {
        "name": str(options.name or _choice(own)),
        "train": [text for text in fixed if not names_launcher(text)],
        "space": space,
        "objectives": _objectives(objectives, dimensions, base, options),
        "sampler": OmegaConf.to_container(options.sampler),
        "pruner": OmegaConf.to_container(options.pruner),
        "parts": [[part.label, list(part.overrides)] for part in parts],
        "seed": base.config.seed,
        "storage": options.storage and masked(options.storage),
        "validations": _validations(base),
    }
    return Spec(options, sweep, dimensions, [base, *samples[1:]], parts, launcher, asked)


def first(options: Any, for_trials: list[str]) -> tuple[Composed, float]:
    """The training of the first point, whose values are not checked, and how many points the space has."""
    fixed, space = _space(build(options, "sweep"), for_trials)
    dimensions = spaces.parse(space)
    point = spaces.overrides(next(spaces.samples(dimensions)))
    return compose("train", [*_untested(fixed), *fixed, *point], check=False), spaces.size(dimensions)


def _untested(fixed: list[str]) -> list[str]:
    return [] if any(text.startswith("test=") for text in fixed) else ["test=false"]


def _space(sweep: studies.Sweep, for_trials: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The overrides that all trials share, and the space. The command line overrides the file; of a key that is given
    twice, the last counts."""
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
        mistakes.append(Mistake("resume", "resumes one run; the same sweep command resumes a sweep"))
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
    if found[0].config.init_from:
        from boltlab.training import init_from

        init_from.settle(found[0].config)
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
    found, mistakes = found or {base.config.monitor: base.config.mode}, []
    sampler, pruner = options.sampler._target_, options.pruner._target_
    if len(found) > 1 and not pruner.endswith(".NopPruner"):
        mistakes.append(Mistake("pruner", f"cannot compare trials by {len(found)} objectives: pruner=none"))
    if len(found) > 1 and sampler.endswith("CmaEsSampler"):
        mistakes.append(Mistake("sampler=cmaes", "has one objective: sampler=tpe, gp, random, grid or qmc"))
    unknown = _not_measured(base)
    mistakes += [Mistake(f"sweep.objectives.{key}", why) for key, why in unknown.items() if key in found]
    if sampler == studies.GRID and (endless := ", ".join(d.key for d in space if d.size() == math.inf)):
        cure = "give choice(…), range(start,stop,step) or int(interval(…)), or another sampler"
        mistakes.append(Mistake("sampler=grid", f"{endless} has endless values: {cure}"))
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _not_measured(base: Composed) -> dict[str, str]:
    """The objectives that these trainings do not measure, and why."""
    found = {}
    if process_count(base.config) > 1:
        found["latency_ms"] = "is measured in trainings of one process: trainer.devices=1"
    if not any("Throughput" in str(node) for node in (base.config.callbacks or {}).values()):
        found["samples_per_second"] = "is counted by a callback that is not there: callbacks=[default,…]"
    return found


def _launcher(base: Composed) -> Any:
    if base.config.launcher is not None and process_count(base.config) > 1:
        mistake = Mistake("launcher", "a worker trains each trial in one process: trainer.devices=1, or no launcher")
        raise ConfigError([mistake])
    return submit.take([base])
