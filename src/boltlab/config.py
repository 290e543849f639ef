"""From the command line to checked configs and built objects: the one place that knows Hydra's rules.

`compose` finds every mistake that can be seen without importing torch (unknown keys, groups and choices, values that
cannot be read). `check` then holds each `_target_` node against the signature that it names. Both raise one ConfigError
that lists all mistakes, before anything is built. `build` is the only caller of `hydra.utils.instantiate`.
"""

import atexit
import copy
import functools
import gc
import itertools
import json
import os
import pickle
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import omegaconf.base
from annotated_types import Ge, Gt, Lt
from omegaconf import DictConfig, ListConfig, OmegaConf

from boltlab import credentials, machine, project, words, world
from boltlab.check import SEARCHED, Checker, ConfigError, Mistake, suggest
from boltlab.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel carries the configs inside the package; a clone has them at its top.
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1] / "configs"

# OmegaConf would parse a reference anew each time that its value is asked for.
vars(omegaconf.base)["parse"] = functools.lru_cache(4096)(vars(omegaconf.base)["parse"])

Precision = Literal["auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64"]


@dataclass
class Train:
    """Root keys of `boltlab train`; the groups (data, model, …) are checked against the classes that they name."""

    seed: Annotated[int, Ge(0), Lt(2**32)]
    monitor: str  # the metric that chooses the best checkpoint, stops early and is returned to a sweep
    mode: Literal["auto", "min", "max"]
    test: bool
    precision: Precision | Literal[16, 32, 64]
    channels_last: bool | Literal["auto"]
    float32_matmul_precision: Literal["auto", "highest", "high", "medium"]
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    timeout_seconds: Annotated[float, Gt(0)]
    max_restarts: Annotated[int, Ge(0)]
    init_from: str | None
    init_strict: bool
    name: str | None
    tags: list[str]
    log_dir: str
    data_dir: str
    run_dir: str | None
    resume: str | None
    resume_changed: Literal["restart_epoch"] | None
    data_fingerprint: Literal["names", "contents", "none"]
    augment: dict | None
    data: dict
    optimizer: dict | None  # null where the model makes its own
    scheduler: dict | None
    model: dict
    trainer: dict
    callbacks: dict | None
    logger: dict | None
    launcher: dict | None


@dataclass
class Bench(Train):
    """Root keys of `boltlab bench`: those of train, and its own."""

    seconds: Annotated[float, Gt(0)]
    output: str | None


@dataclass
class Sweep:
    """Root keys of `boltlab sweep`; any other key is one of its trainings'."""

    sweep: dict
    sampler: dict
    pruner: dict | None
    workers: Annotated[int, Ge(1)] | Literal["auto"]
    seeds: Annotated[int, Ge(1)]
    folds: Annotated[int, Ge(2)] | None
    storage: str | None
    name: str | None
    log_dir: str


@dataclass
class Eval:
    """Root keys of `boltlab eval`; any other key changes the config of the run that is evaluated."""

    run: str
    split: Literal["train", "val", "test"]
    checkpoint: Literal["best", "last"] | None
    log_dir: str
    run_dir: str | None
    callbacks: dict | None
    logger: dict | None


@dataclass
class Reproduce:
    """Root keys of `boltlab reproduce`; any other key changes the config of the run that is trained again."""

    run: str
    compare: str | None
    dry_run: bool
    anyway: bool
    digits: Annotated[int, Ge(1)] | None
    log_dir: str


@dataclass
class Predict:
    """Root keys of `boltlab predict`; any other key changes the config of the run that predicts."""

    run: str
    input: str | list[str] | None
    checkpoint: Literal["best", "last"] | None
    output: str | None
    format: Literal["csv", "json"]
    top_k: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    device: str
    devices: Annotated[int, Ge(1)]
    log_dir: str


@dataclass
class Show:
    """Root keys of `boltlab show`."""

    augment: dict | None
    data: dict
    split: Literal["train", "val", "test"]
    count: int
    output: str
    seed: int
    data_dir: str


@dataclass
class Runs:
    """Root keys of `boltlab runs`; any other word is a filter, or an action and the runs that it is for."""

    log_dir: str
    verb: Literal["train", "eval"]
    sort: str | None
    columns: list[str] | None
    seeds: bool
    limit: Annotated[int, Ge(0)] | None
    format: Literal["table", "md", "csv", "json"]
    yes: bool


@dataclass
class Report:
    """Root keys of `boltlab report`; any other word is a filter of runs."""

    log_dir: str
    verb: Literal["train", "eval"]
    output: str
    limit: Annotated[int, Ge(1)]


@dataclass
class Sync:
    """Root keys of `boltlab sync`; the words before them are `runs`."""

    runs: list[str]
    dry_run: bool
    log_dir: str


@dataclass
class Checkpoint:
    """Root keys of `boltlab checkpoint`; the words before them are an action and what `run` means."""

    run: str | None
    checkpoint: Literal["best", "last"] | None
    output: str | None
    trust: bool
    log_dir: str


@dataclass
class Doctor:
    """Root keys of `boltlab doctor`."""

    augment: dict | None
    data: dict | None
    log_dir: str
    data_dir: str
    seed: int


ROOTS: dict[str, Any] = {
    "train": Train,
    "sweep": Sweep,
    "eval": Eval,
    "reproduce": Reproduce,
    "predict": Predict,
    "show": Show,
    "runs": Runs,
    "report": Report,
    "sync": Sync,
    "checkpoint": Checkpoint,
    "doctor": Doctor,
    "bench": Bench,
}


COMPOSED = ("train", "sweep", "show", "bench", "doctor")  # verbs that compose a new config


@dataclass
class Composed:
    """A config as composed for one verb, with the overrides that made it and the choice taken in each group."""

    verb: str
    config: DictConfig
    overrides: list[str]
    choices: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # groups that the model has no use for


# ---------------------------------------------------------------- composing


def groups() -> dict[str, list[str]]:
    """Every config group with its choices; a file whose name begins with `_` is a part of others, not a choice. As in
    Hydra, `data/sets/small.yaml` is the choice `sets/small` of data, and `small` of the group data/sets."""
    found: dict[str, set[str]] = {}
    for top, folder in [(t, p) for t in config_dirs() for p in t.iterdir() if p.is_dir() and p.name != "hydra"]:
        found.setdefault(folder.name, set())
        for path in (p.relative_to(top).with_suffix("") for p in folder.rglob("*.yaml") if p.stem[0] != "_"):
            for depth in range(1, len(path.parts)):
                found.setdefault("/".join(path.parts[:depth]), set()).add("/".join(path.parts[depth:]))
    return {name: sorted(found[name]) for name in sorted(found)}


def config_dirs() -> list[Path]:
    """The folders that configs are looked for in, the first one first: the project's, `--config-dir`, the engine's."""
    return [*project.config_dirs(), CONFIG_DIR]


@functools.cache
def search_further() -> None:
    """Has Hydra search all of `config_dirs`, of which it is told the first."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class ConfigDirs(SearchPathPlugin):
        def manipulate_search_path(self, search_path: Any) -> None:
            for folder in config_dirs()[1:]:
                search_path.append("boltlab", str(folder))

    Plugins.instance().register(ConfigDirs)


def split_overrides(verb: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of the verb's own root keys, and those that are meant for the config of a run."""
    own = set(ROOTS[verb].__dataclass_fields__) | {"hydra"}
    mine = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in own]
    return mine, [o for o in overrides if o not in mine]


def keys(overrides: list[str]) -> list[str]:
    """The key of each override."""
    return [text.lstrip("+~").partition("=")[0] for text in overrides]


def compose(verb: str, overrides: list[str], sweep: bool = False, check: bool = True) -> Composed:
    """Composes `configs/<verb>.yaml` with the overrides; with `sweep`, values may be lists to run through (`-m`).

    Without `check`, what needs torch and the rest to be imported is left out: the values behind `_target_`.

    Raises:
        ConfigError: with every mistake of the overrides and the files, those of the `_target_` nodes included.
    """
    top = project.current() if verb in COMPOSED else project.find()
    parsed, mistakes = _parse(overrides, sweep)
    known = groups()
    root_keys = list(ROOTS[verb].__dataclass_fields__)
    wrong_groups: set[str] = set()
    chosen: list[Any] = []
    for o in parsed:
        key = o.key_or_group
        if key not in known or o.is_delete():
            continue
        if o.value() is None:
            if key not in ("experiment", "debug", "local", "launcher"):
                wrong_groups.add(key)
                mistakes.append(Mistake(f"{key}=null", f"is no choice; choices: {', '.join(known[key])}"))
            continue
        for choice in _choices(o):
            if choice is not None and choice not in known[key]:
                wrong_groups.add(key)
                allowed = f"choices: {', '.join(known[key]) or 'none yet'}"
                near = suggest(f"{key} has no {choice!r}", str(choice), known[key], allowed)
                mistakes.append(Mistake(f"{key}={choice}", words.CHOICES.get((key, str(choice)), near)))
        if key.split("/")[0] not in (*root_keys, "experiment", "debug", "local"):
            wrong_groups.add(key)
            message = f"boltlab {verb} has no group {key!r}; it takes {', '.join(root_keys)}"
            mistakes.append(Mistake(f"{key}=…", words.KEYS.get(key, message)))
        if key not in wrong_groups:
            chosen.append(o)

    values = [o for o in parsed if o.key_or_group not in known or o.is_delete()]
    values = [o for o in values if o.key_or_group.split(".")[0] not in wrong_groups]
    base, choices = _hydra_compose(verb, [_first(o) for o in chosen], mistakes)
    if base is None:
        raise ConfigError(mistakes)
    kept = []
    for o in values:
        problem = None if o.is_hydra_override() else _key_problem(verb, base, o, known)
        if problem:
            mistakes.append(problem)
        else:
            kept.append(o)
    # A mistyped key answers at once; only where other values could be wrong too are torch and the rest imported.
    if mistakes and not kept:
        raise ConfigError(mistakes)
    plain = all(not o.is_hydra_override() and o.package is None and o.key_or_group not in known for o in kept)
    config: DictConfig | None
    if plain:
        config = _set_values(verb, base, [_first(o) for o in kept], mistakes)
    else:
        config, choices = _hydra_compose(verb, [_first(o) for o in chosen + kept], mistakes)
    if config is None or (mistakes and not check):
        raise ConfigError(mistakes)
    if top is not None and top.trusted:
        _from_the_top(config, top.root, keys(overrides))
    _follow_roots(config)
    if not check:
        return Composed(verb, config, overrides, choices)
    unused = _drop_unused(config) if "model" in config else []
    unused += _drop_loggers(config, keys(overrides))
    for group in unused:
        of_group = [o.input_line for o in parsed if o.key_or_group.split(".")[0] == group and o.value() is not None]
        message = f"has no effect: {config.model.get('_target_')} makes its own {group}, see the keys of model"
        mistakes += [Mistake(line, message) for line in of_group]
    if "augment" not in (config.get("data") or {"augment": None}):
        used = [o.input_line for o in parsed if o.key_or_group.split(".")[0] == "augment"]
        mistakes += [Mistake(line, "augments images, this data holds none") for line in used]
    resumed = [o.input_line for o in parsed if o.key_or_group == "resume" and o.value() is not None]
    mistakes += [
        Mistake(line, "goes on with one run: without -m, and as resume=…") for line in resumed if sweep or check
    ]
    latest = [o for o in parsed if sweep and "init_from=latest" in _texts(o)]
    mistakes += [Mistake("init_from=latest", "is the job before, in all jobs but one: name the run") for _ in latest]
    mistakes += world.settle(config, overrides)
    mistakes += problems(verb, config)
    # A sweep tries each of its values once, the others standing at their first.
    for o in chosen + kept:
        for text in list(_texts(o))[1:]:
            if plain and o in kept:
                texts = [text if p is o else _first(p) for p in kept]
                variant = _set_values(verb, base, texts, mistakes)
            else:
                others = [_first(p) for p in chosen + kept if p is not o]
                variant, _ = _hydra_compose(verb, [*others, text], mistakes)
            if variant is not None:
                mistakes += problems(verb, variant)
    if mistakes:
        raise ConfigError(mistakes)
    return Composed(verb, config, overrides, choices, unused)


def _drop_unused(config: DictConfig) -> list[str]:
    """Sets to null, in place, the groups `optimizer` and `scheduler` where nothing refers to them: the model makes its
    own, and the run is not to record what it did not use."""
    unused = []
    for group in ("scheduler", "optimizer"):  # a schedule may refer to its optimizer
        others = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != group])
        used = re.search(rf"\$\{{[^}}]*\b{group}\b", json.dumps(OmegaConf.to_container(others), default=str))
        if config.get(group) is not None and not used:
            config[group] = None
            unused.append(group)
    return unused[::-1]


def _drop_loggers(config: DictConfig, given: list[str]) -> list[str]:
    """Takes out, in place, what a file says of a logger that was not chosen, and that the command line does not name:
    an experiment may set the group of its W&B runs and be run without W&B."""
    loggers = config.get("logger") or {}
    unused = [name for name in loggers if not (loggers[name] or {}).get("_target_")]
    unused = [name for name in unused if not any(key.startswith(f"logger.{name}") for key in given)]
    for name in unused:
        del loggers[name]
    return [f"logger.{name}" for name in unused]


def _follow_roots(config: DictConfig) -> None:
    """Has a trainer of a project's own YAML follow the root keys, in place, where that leaves out what says so."""
    for key, root in (("precision", "precision"), ("default_root_dir", "run_dir")):
        if key not in (config.get("trainer") or {key: None}):
            config.trainer[key] = f"${{{root}}}"


def _from_the_top(config: DictConfig, root: Path, given: list[str]) -> None:
    """Lets folders that a config names relatively stand in the project, from a folder below it too; what the command
    line names is relative to the current one, as everywhere."""
    for key in ("log_dir", "data_dir"):
        place = None if OmegaConf.is_interpolation(config, key) else config.get(key)
        if isinstance(place, str) and key not in given and Path.cwd() != root:
            config[key] = str(root / Path(place).expanduser())


def grid(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of `-m`: every combination of the values, the last one changing fastest.

    Raises:
        ConfigError: something cannot be read, or an override has no value at all.
    """
    parsed, mistakes = _parse(overrides, sweep=True)
    values = [
        [f"{o.input_line.partition('=')[0]}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    mistakes += [Mistake(o.input_line, "names no value") for o, texts in zip(parsed, values, strict=True) if not texts]
    if mistakes:
        raise ConfigError(mistakes)
    return [list(combination) for combination in itertools.product(*values)]


@dataclass(frozen=True)
class Values:
    """What a key may take: one of `texts` as the command line has them, or a number from `low` to `high`."""

    texts: tuple[str, ...] = ()
    low: float | int = 0
    high: float | int = 0
    step: float | int | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)


def sweep_values(key: str, given: Any) -> Values:
    """The values that a text of Hydra's syntax (`choice(a,b)`, `tag(log,interval(1e-4,1))`) or a list names.

    Raises:
        ValueError: it names none; the message says why.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    if isinstance(given, list):
        return Values(texts=tuple(dict.fromkeys(map(as_override, given))))
    try:
        override = _override(f"{key}={given}")
    except HydraException as e:
        raise ValueError(f"cannot be read: {str(e).splitlines()[0]}") from e
    if not override.is_sweep_override():
        raise ValueError("names one value: give choice(a,b), range(start,stop,step) or interval(low,high)")
    values: Any = override.value()
    if isinstance(values, IntervalSweep):
        assert values.start is not None and values.end is not None
        low, high, log = values.start, values.end, "log" in values.tags
        if not low < high or (log and low <= 0):
            raise ValueError("is empty: low must be below high" + (", and above 0 for its logarithm" if log else ""))
        return Values(low=low, high=high, log=log)
    if isinstance(values, RangeSweep):
        numbers = list(values.range())
        if len(numbers) < 2:
            raise ValueError(f"is {numbers}: a range needs two values at least")
        return Values(low=min(numbers), high=max(numbers), step=abs(values.step))
    if isinstance(values, ChoiceSweep):
        return Values(texts=tuple(dict.fromkeys(map(as_override, override.sweep_iterator()))))
    raise ValueError("is a pattern: name the choices, choice(a,b,c)")


def as_override(value: Any) -> str:
    """A plain value as it is written behind the `=` of an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_override(part)}' for key, part in value.items())}}}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        )
        return value if plain else "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"
    return repr(value)


def split_space(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides with one value, and those with several as a space: key -> what is written behind its `=`.

    Raises:
        ConfigError: something cannot be read.
    """
    from hydra.errors import HydraException

    fixed, space = [], {}
    for text in overrides:
        try:
            several = _override(text).is_sweep_override()
        except HydraException:
            several = False  # `compose` says what is wrong with it
        if several:
            key, _, values = text.partition("=")
            space[key] = values
        else:
            fixed.append(text)
    return fixed, space


def parsed(overrides: list[str]) -> list[Any]:
    """Hydra's overrides: `key_or_group`, `value()`, `is_delete()` of each. They have been composed before."""
    return list(map(_override, overrides))


@functools.lru_cache(maxsize=1024)
def _override(text: str) -> Any:
    """Hydra's reading of one override, which takes 1 ms: the jobs of a sweep share all but a few. Nobody may change it.

    Raises:
        HydraException: it cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def edit(config: DictConfig, overrides: list[str], refused: tuple[str, ...] = (), settled: bool = False) -> DictConfig:
    """A run's config with overrides on top: `data=cifar10` swaps a whole group, `data.batch_size=8` one value.

    settled: its `mode` is not questioned, for what it has chosen cannot be chosen anew.

    Raises:
        ConfigError: with every mistake, those of the whole check included.
    """
    parsed, mistakes = _parse(overrides, sweep=False)
    known = {k: v for k, v in groups().items() if k in Train.__dataclass_fields__}
    swapped = {o.key_or_group for o in parsed if o.key_or_group in known and not o.is_delete()}
    edited = OmegaConf.create(OmegaConf.to_container(config))
    assert isinstance(edited, DictConfig)
    # A run made before these keys existed did this.
    before = {"channels_last": False, "float32_matmul_precision": "highest"}
    before |= {"resume": None, "resume_changed": None, "init_strict": True, "launcher": None}
    before |= {"timeout_seconds": 300.0, "max_restarts": 0, "data_fingerprint": "names"}
    edited.update({key: value for key, value in before.items() if key not in edited})
    edited.init_from = None  # what the run began with may be gone
    _follow_again(edited, keys(overrides))
    fresh = None
    if swapped:
        inside = [o.input_line for o in parsed if o.key_or_group.split(".")[0] in swapped]
        inside += [f"{key}={json.dumps(config[key])}" for key in ("seed", "data_dir") if key in config]
        fresh = compose("train", inside, check=False).config  # it is checked below, with what the run has
        if "data" in swapped:
            _take_over(OmegaConf.to_container(config.data, resolve=True), fresh.data, keys(inside))
        for group in swapped | ({"augment"} if "data" in swapped else set()):
            edited[group] = fresh[group]
    for o in parsed:
        if o.key_or_group.split(".")[0] in swapped:
            continue
        problem = _key_problem("train", edited, o, known)
        if o.key_or_group in (*refused, "experiment", "debug", "local") and o.value() is not None:
            problem = Mistake(o.input_line, "belongs to a new run")
        if o.key_or_group in SEARCHED and o.value() == "auto":
            problem = Mistake(o.input_line, "is searched by boltlab train only: give a number")
        if problem:
            mistakes.append(problem)
        elif o.is_delete():
            parent, _, last = o.key_or_group.rpartition(".")
            (OmegaConf.select(edited, parent) if parent else edited).pop(last)
        else:
            OmegaConf.update(edited, o.key_or_group, o.value(), merge=True, force_add=True)
    mistakes += world.settle(edited, overrides)
    if mistakes:
        raise ConfigError(mistakes)
    return finish("train", edited, settled)


def _follow_again(config: DictConfig, changed: list[str]) -> None:
    """Where `monitor` or `mode` is changed: lets `mode` follow `monitor`, and what has the root's values refer to them
    again, in place. A run's config holds values alone."""
    monitor, mode = config.get("monitor"), config.get("mode")
    nodes = [config] if {"monitor", "mode"} & set(changed) else []
    for node in nodes:
        nodes += [child for name in node if isinstance(child := node._get_node(name), DictConfig)]
        key = "monitor_mode" if "monitor_mode" in node else "mode"
        if node is not config and (node.get("monitor"), node.get(key)) == (monitor, mode):
            node.update({"monitor": "${monitor}", key: "${mode}"})
    if nodes:
        config.mode = "auto"


def _take_over(trained: Any, fresh: DictConfig, given: list[str]) -> None:
    """What a swapped data group takes from the run, unless it is given: what it leaves open; the normalization that the
    net was trained on; and, for data of the same class, where the splits lie."""
    for key, value in trained.items():
        if key not in fresh.keys() or f"data.{key}" in given:  # noqa: SIM118 (`in` passes over what is missing)
            continue
        is_open = OmegaConf.is_missing(fresh, key) or fresh[key] == "auto"
        if key == "input_shape":  # a table's: its features are found by name
            is_open &= len(value) == 1
        same_inputs = key in ("mean", "std") and fresh.get("input_shape") == trained.get("input_shape")
        if is_open or same_inputs or (key in _SPLITS and fresh._target_ == trained["_target_"]):
            fresh[key] = value


_SPLITS = ("val_fraction", "test_fraction", "split_seed", "folds", "fold", "max_samples")


def _parse(overrides: list[str], sweep: bool) -> tuple[list[Any], list[Mistake]]:
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    parsed, mistakes = [], []
    for text in overrides:
        key, _, value = text.partition("=")
        inner = f'"{value}"'
        if re.fullmatch(r"\[[^\[\]{}\"']*\]", value):  # in quotes as a whole, a list would be a text
            inner = '["' + '","'.join(part.strip() for part in value[1:-1].split(",")) + '"]'
        quoted = f"quote it for the shell and for Hydra: '{key}={inner}'"
        try:
            override = _override(text)
        except HydraException:
            message = (
                f"cannot be read; {quoted}" if value else "is no key=value pair; boltlab <verb> --help shows the keys"
            )
            mistakes.append(Mistake(text, message))
            continue
        bare = key.lstrip("+~")
        if bare.startswith(("hydra.", "hydra/")):
            mistakes.append(Mistake(text, "has no effect here: log_dir=… and name=… choose the run folder"))
        elif key == "run_dir":
            mistakes.append(Mistake(text, "is filled in by the run; log_dir=… and name=… choose where it goes"))
        elif override.value() == "" and "'" not in value and '"' not in value and not override.is_delete():
            mistakes.append(Mistake(text, f"is empty: give a value, or {key}=null for none"))
        elif override.is_sweep_override() and not override.is_discrete_sweep():
            mistakes.append(Mistake(text, "names no list of values: write a,b,c or range(start,stop,step)"))
        elif override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            mistakes.append(Mistake(text, "is a pattern: name the choices, a,b,c"))
        elif override.is_sweep_override() and not sweep:
            mistakes.append(Mistake(text, f"names several values: add -m to run them all; if it is one text, {quoted}"))
        else:
            parsed.append(override)
    return parsed, mistakes


def _choices(override: Any) -> list[Any]:
    """Every choice that a group override names: one, a list of several, or one of a sweep."""
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    return [choice for value in values for choice in (value if isinstance(value, list) else [value])]


def _texts(override: Any) -> Iterator[str]:
    """The override as plain command-line texts, one for each value of a sweep."""
    prefix = override.input_line.partition("=")[0]
    if not override.is_sweep_override():
        yield (
            override.input_line
            if not override.is_add()
            else "+" * (not override.input_line.startswith("++")) + override.input_line
        )
    elif override.is_discrete_sweep():
        for value in override.sweep_string_iterator():
            yield f"{prefix}={value}"


def _first(override: Any) -> str:
    return next(_texts(override), override.input_line)


def _hydra_compose(
    verb: str, overrides: list[str], mistakes: list[Mistake]
) -> tuple[DictConfig | None, dict[str, Any]]:
    """A config of its own for the caller, and the choices. What was composed before is composed again only where a
    file, or a variable that one may refer to, is another: Hydra takes 0.1 s, most of what the next of many runs costs.
    """
    folders = config_dirs()
    files = sorted((str(path), path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*.yaml"))
    name = project.config_name(verb)
    try:
        composed = _composed(name, tuple(overrides), tuple(folders), tuple(files), tuple(os.environ.items()))
    except Exception as e:  # Hydra meets odd overrides with more than its own exceptions
        mistakes.append(_hydra_mistake(verb, e))
        return None, {}
    config, choices = pickle.loads(composed)  # a fifth of the time of a deep copy
    return config, choices


@functools.lru_cache(maxsize=64)
def _composed(name: str, overrides: tuple[str, ...], folders: tuple[Path, ...], *_: Any) -> bytes:
    """Config and choices, pickled. The other arguments are what they depend on."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    search_further()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folders[0]), job_name=name, version_base="1.3"):
            config = hydra_compose(name, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().clear()
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return pickle.dumps((config, {k: v for k, v in choices.items() if not k.startswith("hydra/")}))


def _set_values(verb: str, config: DictConfig, overrides: list[str], mistakes: list[Mistake]) -> DictConfig | None:
    """A composed config with values changed: what Hydra does at the end of composing, without composing again."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, True)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(parsed(overrides), config)
    except Exception as e:  # as above
        mistakes.append(_hydra_mistake(verb, e))
        return None
    OmegaConf.set_struct(config, False)
    return config


def _hydra_mistake(verb: str, error: Exception) -> Mistake:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
    if words.PRIMARY[0] in _primary(project.config_name(verb)):
        lines.append(words.PRIMARY[1])
    return Mistake(f"configs/{project.config_name(verb)}.yaml and its groups", "; ".join(lines))


def _key_problem(verb: str, config: DictConfig, override: Any, known: dict[str, list[str]]) -> Mistake | None:
    """Says why an override's key names nothing in the config, with the nearest name that does."""
    where = override.input_line
    parts = override.key_or_group.split(".")
    if (override.is_add() or override.is_force_add()) and len(
        parts
    ) > 1:  # a `+` adds an argument: `check` knows whether it exists
        return None
    node: Any = config
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        names = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if part not in names:
            path = ".".join(parts[:depth])
            if not path:
                roots = list(ROOTS[verb].__dataclass_fields__)
                near = suggest(f"there is no key {part!r}", part, [*roots, *known], f"keys: {', '.join(roots)}")
                return Mistake(where, words.KEYS.get(part, near))
            if not names:
                return Mistake(where, f"{path} is a single value, it has no {part!r}")
            target = node.get("_target_")
            more = (
                f"; another argument of {target}: +{override.key_or_group}=…"
                if target and not override.is_delete()
                else ""
            )
            return Mistake(where, suggest(f"{path} has no {part!r}", part, names, f"keys: {', '.join(names)}{more}"))
        child = node._get_node(part)
        if depth < len(parts) - 1 and OmegaConf.is_interpolation(node, part):
            here, origin = ".".join(parts[: depth + 1]), str(child._value()).strip("${}")
            return Mistake(where, f"{here} is taken from {origin}: set {origin}.{'.'.join(parts[depth + 1 :])}=…")
        node = child
    return None


def help_text(verb: str) -> str:
    """The groups of a verb with their choices, and its root keys with their defaults; reads YAML files only."""
    fields = ROOTS[verb].__dataclass_fields__
    defaults, entries = _inherited(project.config_name(verb))
    listed = {str(k).split()[-1] for entry in entries if isinstance(entry, DictConfig) for k in entry}
    lines = []
    for group, choices in groups().items():
        if group in listed and choices:
            text = textwrap.fill(" ".join(choices), 84, subsequent_indent=" " * 13)
            lines.append(f"  {group:<11}{text}")
    keys = [f"  {key}={_yaml_value(defaults, key)}" for key in fields if key in defaults and key not in listed]
    parts = ["Groups: take a choice with group=choice, change one of its keys with group.key=value", *lines, ""]
    return "\n".join([*(parts if lines else []), "Keys", *keys])


def _inherited(name: str) -> tuple[DictConfig, list[Any]]:
    """A primary config over those that its defaults list names, without these lists; and the entries of all of them."""
    config = _primary(name)
    entries = list(config.pop("defaults", []))
    for parent in [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]:
        below, more = _inherited(parent)
        below.merge_with(config)
        config, entries = below, entries + more
    return config, entries


def _primary(name: str) -> DictConfig:
    found = next((path for folder in config_dirs() if (path := folder / f"{name}.yaml").is_file()), None)
    config = OmegaConf.load(found) if found else None
    if not isinstance(config, DictConfig):
        raise ConfigError([Mistake(f"--config-name {name}", f"{found or f'no {name}.yaml'} holds no config")])
    return config


def _yaml_value(node: DictConfig, key: str) -> str:
    return (
        "???"
        if OmegaConf.is_missing(node, key)
        else json.dumps(node[key] if not OmegaConf.is_config(node[key]) else [])
    )


# ---------------------------------------------------------------- checking


def finish(verb: str, config: DictConfig, settled: bool = False) -> DictConfig:
    """Fills in what only the data or the machine can tell, in place, and checks everything. settled: see `edit`.

    Raises:
        ConfigError: with every mistake.
    """
    mistakes = problems(verb, config, settled)
    if mistakes:
        raise ConfigError(mistakes)
    return config


@contextmanager
def imports() -> Iterator[None]:
    """Around the place where torch and the rest are imported: they leave a million objects for good, and each full
    collection of the garbage collector walks through them, eight times meanwhile and then all through the training; in
    a process forked from this one, such a walk copies all of them."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else nanobind, which comes with triton, reports all of its functions as leaked


@imports()
def problems(verb: str, config: DictConfig, settled: bool = False) -> list[Mistake]:
    """Every mistake in a composed config; fills in, in place, what stands at "auto". settled: see `edit`."""
    if "augment" in config and "augment" not in (config.get("data") or {}):
        config.augment = None  # a table has none; its preset would ask the data for an image's shape
    checker = Checker(config, SEARCHED if verb == "train" else ())
    checker.roots(ROOTS[verb].__dataclass_fields__)
    secrets = [Mistake(where, message) for where, message in credentials.mistakes(config)]
    if secrets:  # alone: other messages show the values
        return secrets
    if verb == "eval":  # its callbacks refer to the config of the run: they are checked when they are laid over it
        return checker.found
    open_keys = machine.placeholders(config)
    checker.groups()
    if config.get("data") is not None and not checker.found:
        checker.discover()
    checker.walk(config, "")
    if not checker.found:
        machine.resolve(config, open_keys, build)
        checker.together(open_mode="mode" in open_keys, modes=not settled)
    return checker.found


# ---------------------------------------------------------------- building


def build(config: Any, key: str, **objects: Any) -> Any:
    """Builds the object that the node at `key` describes; `objects` are passed as they are.

    Raises:
        ConfigError: a class refused its arguments; the message names the node.
        UserError: raised by the class itself, passed on as it is.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    node = OmegaConf.select(config, key) if OmegaConf.is_config(config) else config[key]
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        return instantiate({"_convert_": "all", **plain}, **objects)
    except InstantiationException as e:
        cause = e.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError) or type(cause).__name__ == "MisconfigurationException":
            inner = re.search(r"full_key: (\S+)", str(e))
            where = f"{key}.{inner[1]}" if inner else key
            raise ConfigError([Mistake(where, " ".join(str(cause).split()))]) from cause
        raise


def report(verb: str, error: ConfigError) -> None:
    """Prints all mistakes to stderr, in at most a screenful."""
    count = len(error.mistakes)
    lines = credentials.masked(str(error)).splitlines()
    print(f"boltlab {verb}: {count} mistake{'s' * (count > 1)} in the config, nothing was started\n", file=sys.stderr)
    print("\n".join(line if len(line) <= 400 else line[:399] + "…" for line in lines[:40]), file=sys.stderr)
    if len(lines) > 40:
        print(f"  … and {(len(lines) - 40) // 2} more", file=sys.stderr)
