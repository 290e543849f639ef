"""Composing a config with Hydra, and finding every mistake in it before anything is built.

`compose` finds what can be seen without importing torch (unknown keys, groups and choices, values that cannot be read)
first. `validate` then checks each `_target_` node against the signature that it names. Both raise one ConfigError that
lists all mistakes.
"""

import copy
import functools
import json
import os
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import omegaconf.base
from omegaconf import DictConfig, ListConfig, OmegaConf

from boltlab.config import devices, project, words
from boltlab.config.overrides import choices_of, first_text, keys, parse, parsed, variants
from boltlab.config.roots import COMPOSED, ROOTS
from boltlab.config.sources import config_dirs, groups, search_further
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
    unused: list[str] = field(default_factory=list)  # groups that the model has no use for


def compose(verb: str, overrides: list[str], sweep: bool = False, check: bool = True) -> Composed:
    """Composes `configs/<verb>.yaml` with the overrides; with `sweep`, values may be lists to run through (`-m`).

    Without `check`, what needs torch and the rest to be imported is left out: the values behind `_target_`.

    Raises:
        ConfigError: with every mistake of the overrides and the files, those of the `_target_` nodes included.
    """
    top = project.current() if verb in COMPOSED else project.find()
    parsed, mistakes = parse(overrides, sweep)
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
        for choice in choices_of(o):
            if choice is not None and choice not in known[key]:
                wrong_groups.add(key)
                allowed = f"choices: {', '.join(known[key]) or 'none yet'}"
                near = suggest(f"{key} has no {choice!r}", str(choice), known[key], allowed)
                mistakes.append(Mistake(f"{key}={choice}", words.CHOICES.get((key, str(choice)), near)))
        if key not in root_keys and key not in ("experiment", "debug", "local"):
            wrong_groups.add(key)
            mistakes.append(
                Mistake(f"{key}=…", f"boltlab {verb} has no group {key!r}; it takes {', '.join(root_keys)}")
            )
        if key not in wrong_groups:
            chosen.append(o)

    values = [o for o in parsed if o.key_or_group not in known or o.is_delete()]
    values = [o for o in values if o.key_or_group.split(".")[0] not in wrong_groups]
    base, choices = _hydra_compose(verb, [first_text(o) for o in chosen], mistakes)
    if base is None:
        raise ConfigError(mistakes)
    kept = []
    for o in values:
        problem = None if o.is_hydra_override() else key_problem(verb, base, o, known)
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
        config = _set_values(verb, base, [first_text(o) for o in kept], mistakes)
    else:
        config, choices = _hydra_compose(verb, [first_text(o) for o in chosen + kept], mistakes)
    if config is None or (mistakes and not check):
        raise ConfigError(mistakes)
    if top is not None and top.trusted:
        _from_the_top(config, top.root, keys(overrides))
    if not check:
        return Composed(verb, config, overrides, choices)
    unused = _drop_unused(config) if "model" in config else []
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
    latest = [o for o in parsed if sweep and "init_from=latest" in variants(o)]
    mistakes += [Mistake("init_from=latest", "is the job before, in all jobs but one: name the run") for _ in latest]
    mistakes += devices.settle(config, overrides)
    mistakes += problems(verb, config)
    # A sweep tries each of its values once, the others standing at their first.
    for o in chosen + kept:
        for text in list(variants(o))[1:]:
            if plain and o in kept:
                texts = [text if p is o else first_text(p) for p in kept]
                variant = _set_values(verb, base, texts, mistakes)
            else:
                others = [first_text(p) for p in chosen + kept if p is not o]
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


def _from_the_top(config: DictConfig, root: Path, given: list[str]) -> None:
    """Lets folders that a config names relatively stand in the project, from a folder below it too; what the command
    line names is relative to the current one, as everywhere."""
    for key in ("log_dir", "data_dir"):
        place = None if OmegaConf.is_interpolation(config, key) else config.get(key)
        if isinstance(place, str) and key not in given and Path.cwd() != root:
            config[key] = str(root / Path(place).expanduser())


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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Mistake(f"configs/{project.config_name(verb)}.yaml and its groups", "; ".join(lines[:4]))


def key_problem(verb: str, config: DictConfig, override: Any, known: dict[str, list[str]]) -> Mistake | None:
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
