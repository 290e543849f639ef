"""Composing a config with Hydra, and finding every mistake in it before anything is built.

What can be seen without importing torch (unknown keys, groups and choices, values that cannot be read) is found first.
"""

import copy
import functools
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import omegaconf.base
from omegaconf import DictConfig, ListConfig, OmegaConf

from boltlab.config import devices, project, words
from boltlab.config.overrides import as_texts, choices_of, first_text, keys, parse, read, variants
from boltlab.config.roots import COMPOSED, ROOTS
from boltlab.config.sources import config_dirs, groups, not_chosen, primary, search_further
from boltlab.config.validate import problems
from boltlab.ground.errors import ConfigError, Mistake, suggest

# OmegaConf would parse a reference anew each time that its value is asked for.
vars(omegaconf.base)["parse"] = functools.lru_cache(4096)(vars(omegaconf.base)["parse"])


@dataclass
class Composed:
    """A config as composed for one verb, with the overrides that made it and the choice taken in each group."""

    verb: str
    config: DictConfig
    overrides: list[str]
    choices: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # loggers that a file sets and nobody chose


def compose(verb: str, overrides: list[str], sweep: bool = False, check: bool = True) -> Composed:
    """Composes `configs/<verb>.yaml` with the overrides; with `sweep`, values may be lists to run through (`-m`).

    Without `check`, what needs torch and the rest to be imported is left out: the values behind `_target_`.

    Raises:
        ConfigError: with every mistake of the overrides and the files, those of the `_target_` nodes included.
    """
    needed = verb != "doctor" or "data" in keys(overrides)
    top = project.current(verb, needed) if verb in COMPOSED else project.find()
    request = _Request(verb, overrides, sweep)
    overrides = request.overrides
    config, choices = request.compose(check)
    _expand_home(config)
    if top is not None and top.trusted:
        _from_the_top(config, top.root, keys(overrides))
    _follow_roots(config)
    if not check:
        return Composed(verb, config, overrides, choices)
    reasons = _drop_unused(config) if "model" in config else {}
    mistakes = request.mistakes
    mistakes += request.without_effect(reasons)
    unused = _drop_loggers(config, keys(overrides))
    mistakes += _of_one_run(request.parsed, sweep)
    mistakes += devices.settle(config, overrides)
    texts: set[str] = set()
    mistakes += problems(verb, config, texts=texts)
    for variant in request.further():
        mistakes += problems(verb, variant, texts=texts)
    if (typed := as_texts(overrides, texts)) != overrides:
        return compose(verb, typed, sweep)
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))
    return Composed(verb, config, overrides, choices, unused)


class _Request:
    """The overrides of a command, `chosen` of groups and `kept` of values, and the mistakes that were found so far."""

    def __init__(self, verb: str, overrides: list[str], sweep: bool) -> None:
        self.verb, self.known = verb, groups()
        self.overrides = as_texts(overrides, set(self.known))
        self.parsed, self.mistakes = parse(self.overrides, sweep)
        self.wrong: set[str] = set()  # groups
        self.chosen = [o for o in self.parsed if self._names_group(o) and self._is_choice(o)]
        self.kept: list[Any] = []
        self.plain = True  # no value changes what Hydra composes
        self.base = DictConfig({})  # as composed of the chosen groups
        self.choices: dict[str, Any] = {}

    def _names_group(self, override: Any) -> bool:
        return override.key_or_group in self.known and not override.is_delete()

    def _is_choice(self, override: Any) -> bool:
        if found := list(self._group_mistakes(override)):
            self.wrong.add(override.key_or_group)
            self.mistakes += found
        return not found and override.value() is not None

    def _group_mistakes(self, override: Any) -> Iterator[Mistake]:
        key = override.key_or_group
        known, roots = self.known[key], list(ROOTS[self.verb])
        if (override.is_add() or override.is_force_add()) and "/" not in key and override.package is None:
            plain = override.input_line.lstrip("+")
            yield Mistake(override.input_line, f"is a group, whose choice is given without a +: {plain}")
        if override.value() is None:
            if key not in (*_NO_ROOT, "launcher"):
                yield Mistake(f"{key}=null", not_chosen(key))
            return
        for choice in choices_of(override):
            if choice is not None and choice not in known:
                allowed = f"choices: {', '.join(known) or 'none yet'}"
                near = suggest(f"{key} has no {choice!r}", str(choice), known, allowed)
                yield Mistake(f"{key}={choice}", words.CHOICES.get((key, str(choice)), near))
        if key.split("/")[0] not in (*roots, *_NO_ROOT):
            message = f"boltlab {self.verb} has no group {key!r}; it takes {', '.join(roots)}"
            yield Mistake(f"{key}=…", words.KEYS.get(key, message))

    def compose(self, check: bool) -> tuple[DictConfig, dict[str, Any]]:
        """The config, each key of a sweep at its first value, and the choices.

        Raises:
            ConfigError: there is none, or, without `check`, there are mistakes.
        """
        base, self.choices = _hydra_compose(self.verb, list(map(first_text, self.chosen)), self.mistakes)
        if base is None:
            raise ConfigError(self.mistakes)
        self.base = base
        values = [o for o in self.parsed if not self._names_group(o)]
        self.kept = [o for o in values if o.key_or_group.split(".")[0] not in self.wrong and self._is_key(o)]
        # A mistyped key answers at once; only where other values could be wrong too are torch and the rest imported.
        if self.mistakes and not self.kept:
            raise ConfigError(self.mistakes)
        self.plain = all(o.package is None and o.key_or_group not in self.known for o in self.kept)
        config = self._with()
        if config is None or (self.mistakes and not check):
            raise ConfigError(self.mistakes)
        return config, self.choices

    def _is_key(self, override: Any) -> bool:
        if problem := key_problem(self.verb, self.base, override, self.known):
            self.mistakes.append(problem)
        return problem is None

    def further(self) -> Iterator[DictConfig]:
        """The configs of a sweep besides the first: each further value once, the others at their first."""
        configs = (self._with(o, text) for o in self.chosen + self.kept for text in variants(o)[1:])
        return (config for config in configs if config is not None)

    def _with(self, changed: Any = None, text: str = "") -> DictConfig | None:
        """The config, each override at its first value, but `changed` as `text`."""
        chosen, kept = ([text if o is changed else first_text(o) for o in part] for part in (self.chosen, self.kept))
        if self.plain and changed not in self.chosen:
            return _set_values(self.verb, self.base, kept, self.mistakes)
        config, self.choices = _hydra_compose(self.verb, chosen + kept, self.mistakes)
        return config

    def without_effect(self, reasons: dict[str, str]) -> Iterator[Mistake]:
        """What the command line, or a file that it or this machine chooses, says of groups that have no use: group ->
        the reason. What is only a default is not named."""
        said = set()
        for o in self.parsed:
            group = o.key_or_group.split(".")[0]
            said.add(group)  # also as ~group
            if group in reasons and o.value() is not None:
                yield Mistake(o.input_line, reasons[group])
        files = {key: self.choices.get(key) for key in _NO_ROOT if self.choices.get(key) in self.known.get(key, ())}
        if files and (left := [group for group in reasons if group not in said]):
            from boltlab.config import unused

            yield from unused.of_files(self.choices, files, {group: reasons[group] for group in left}, self._composed)

    def _composed(self, overrides: list[str]) -> tuple[DictConfig | None, dict[str, Any]]:
        return _hydra_compose(self.verb, overrides, [])


_NO_ROOT = ("experiment", "debug", "local")  # groups that set keys of others


def _of_one_run(parsed: list[Any], sweep: bool) -> Iterator[Mistake]:
    """Overrides that name one run, where several are started or none is resumed."""
    for o in parsed:
        if o.key_or_group == "resume" and o.value() is not None:
            yield Mistake(o.input_line, "resumes one run: without -m, and as resume=…")
        if sweep and "init_from=latest" in variants(o):
            yield Mistake("init_from=latest", "is the job before, in all jobs but one: name the run")


def _drop_unused(config: DictConfig) -> dict[str, str]:
    """Sets to null, in place, the groups that nothing refers to: the model makes its own optimizer and so on, and the
    run is not to record what it did not use. Returns why each has no effect."""
    reasons = {}
    for group in ("metrics", "loss", "scheduler", "optimizer"):  # a schedule may refer to its optimizer
        others = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != group])
        used = re.search(rf"\$\{{[^}}]*\b{group}\b", json.dumps(OmegaConf.to_container(others), default=str))
        if config.get(group) is not None and not used:
            config[group] = None
            reasons[group] = (
                f"has no effect: {config.model.get('_target_')} makes its own {group}, see the keys of model"
            )
    if "augment" not in (config.get("data") or {"augment": None}):
        reasons["augment"] = "has no effect: it augments images, and this data holds none"
    return reasons


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


def _expand_home(node: Any) -> None:
    """Has each text that begins with ~/ begin with the home folder, in place: else a folder named ~ is made."""
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        text = child._value() if child is not None else None
        if isinstance(text, str) and text.startswith("~/"):
            node[key] = os.path.expanduser(text)
        elif OmegaConf.is_config(child) and isinstance(text, dict | list):  # no reference, not missing
            _expand_home(child)


def _from_the_top(config: DictConfig, root: Path, given: list[str]) -> None:
    """Lets folders that a config names relatively stand in the project, from a folder below it too; what the command
    line names is relative to the current one, as everywhere."""
    for key in ("log_dir", "data_dir"):
        place = None if OmegaConf.is_interpolation(config, key) else config.get(key)
        if isinstance(place, str) and key not in given and root in Path.cwd().parents:
            config[key] = str(root / Path(place).expanduser())
    _shipped(config.get("data") or {}, root, given)


def _shipped(data: Any, root: Path, given: list[str]) -> None:
    """Lets a file or folder of data that a config names relatively, and is not here, be that of the project."""
    for key in [key for key in ("path", "root") if key in data and not OmegaConf.is_missing(data, key)]:
        place = None if OmegaConf.is_interpolation(data, key) or f"data.{key}" in given else data[key]
        if isinstance(place, str) and not Path(place).expanduser().exists() and (root / place).exists():
            data[key] = str(root / place)


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
    if "project" in config and config.project is None:
        own = project.find()
        config.project = own.name if own else "boltlab"
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
        ConfigLoaderImpl._apply_overrides_to_config(list(map(read, overrides)), config)
    except Exception as e:  # as above
        mistakes.append(_hydra_mistake(verb, e))
        return None
    OmegaConf.set_struct(config, False)
    return config


def _hydra_mistake(verb: str, error: Exception) -> Mistake:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
    if words.PRIMARY[0] in primary(project.config_name(verb)):
        lines.append(words.PRIMARY[1])
    return Mistake(f"configs/{project.config_name(verb)}.yaml and its groups", "; ".join(lines))


def key_problem(verb: str, config: DictConfig, override: Any, known: dict[str, list[str]]) -> Mistake | None:
    """Says why an override's key names nothing in the config, with the nearest name that does."""
    parts = override.key_or_group.split(".")
    if (override.is_add() or override.is_force_add()) and len(parts) > 1:
        return None  # a `+` adds an argument: `check` knows whether it exists
    node: Any = config
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        names = [str(key) for key in node] if isinstance(node, DictConfig) else []
        if part not in names:
            where = ".".join(parts[:depth])
            if not where:
                return Mistake(override.input_line, _unknown_root(verb, part, known))
            if not names:
                return Mistake(override.input_line, f"{where} is a single value, it has no {part!r}")
            return Mistake(override.input_line, _unknown_key(node, where, part, names, override))
        child = node._get_node(part)
        if depth < len(parts) - 1 and OmegaConf.is_interpolation(node, part):
            here, origin = ".".join(parts[: depth + 1]), str(child._value()).strip("${}")
            cure = f"set {origin}.{'.'.join(parts[depth + 1 :])}=…"
            return Mistake(override.input_line, f"{here} is taken from {origin}: {cure}")
        node = child
    return None


def _unknown_root(verb: str, key: str, known: dict[str, list[str]]) -> str:
    roots = list(ROOTS[verb])
    near = suggest(f"there is no key {key!r}", key, [*roots, *known], f"keys: {', '.join(roots)}")
    return words.KEYS.get(key, near)


def _unknown_key(node: DictConfig, where: str, key: str, names: list[str], override: Any) -> str:
    target = None if override.is_delete() else node.get("_target_")
    more = f"; another argument of {target}: +{override.key_or_group}=…" if target else ""
    return suggest(f"{where} has no {key!r}", key, names, f"keys: {', '.join(names)}{more}")
