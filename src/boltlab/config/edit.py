"""Changing the config of a run: what `resume=`, `eval` and `reproduce` are given on the command line."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab.config import devices
from boltlab.config.check import SEARCHED
from boltlab.config.compose import compose, key_problem
from boltlab.config.overrides import as_texts, keys, parse
from boltlab.config.roots import ROOTS
from boltlab.config.sources import groups
from boltlab.config.validate import problems
from boltlab.ground.errors import ConfigError, Mistake


def edit(config: DictConfig, overrides: list[str], refused: tuple[str, ...] = (), settled: bool = False) -> DictConfig:
    """A run's config with overrides on top: `data=cifar10` swaps a whole group, `data.batch_size=8` one value.

    settled: its `mode` is not questioned, for what it has chosen cannot be chosen anew.

    Raises:
        ConfigError: with every mistake, those of the whole check included.
    """
    parsed, mistakes = parse(overrides, sweep=False)
    known = {name: choices for name, choices in groups().items() if name in ROOTS["train"]}
    swapped = {o.key_or_group for o in parsed if o.key_or_group in known and not o.is_delete()}
    plain: Any = OmegaConf.to_container(config)
    edited = DictConfig(plain | _BEFORE | plain)  # what the run has, in its order, and behind it what it lacks
    edited.init_from = None  # what the run began with may be gone
    _follow_again(edited, keys(overrides))
    if swapped:
        _swap(edited, config, swapped, parsed)
    for o in [o for o in parsed if o.key_or_group.split(".")[0] not in swapped]:
        if problem := _refusal(o, refused) or key_problem("train", edited, o, known):
            mistakes.append(problem)
        else:
            _set(edited, o)
    mistakes += devices.settle(edited, overrides)
    texts: set[str] = set()
    if mistakes := mistakes or problems("train", edited, settled, texts):
        if (typed := as_texts(overrides, texts)) != overrides:
            return edit(config, typed, refused, settled)
        raise ConfigError(mistakes)
    return edited


def _set(config: DictConfig, override: Any) -> None:
    key = override.key_or_group
    if override.is_delete():
        parent, _, last = key.rpartition(".")
        (OmegaConf.select(config, parent) if parent else config).pop(last)
    else:
        OmegaConf.update(config, key, override.value(), merge=True, force_add=True)


# A run that was made before these keys existed did this.
_BEFORE: dict[str, Any] = {
    "channels_last": False,
    "float32_matmul_precision": "highest",
    "resume": None,
    "resume_changed": None,
    "init_strict": True,
    "launcher": None,
    "timeout_seconds": 300.0,
    "max_restarts": 0,
    "data_fingerprint": "names",
}


def _refusal(override: Any, refused: tuple[str, ...]) -> Mistake | None:
    if override.key_or_group in SEARCHED and override.value() == "auto":
        return Mistake(override.input_line, "is searched by boltlab train only: give a number")
    if override.key_or_group in (*refused, "experiment", "debug", "local") and override.value() is not None:
        return Mistake(override.input_line, "belongs to a new run")
    return None


def _swap(edited: DictConfig, config: DictConfig, swapped: set[str], overrides: list[Any]) -> None:
    """Puts whole groups as they are composed anew into `edited`; it is checked later, with what the run has."""
    inside = [o.input_line for o in overrides if o.key_or_group.split(".")[0] in swapped]
    inside += [f"{key}={json.dumps(config[key])}" for key in ("seed", "data_dir") if key in config]
    fresh = compose("train", inside, check=False).config
    if "data" in swapped:
        _take_over(OmegaConf.to_container(config.data, resolve=True), fresh.data, keys(inside))
    for group in swapped | ({"augment"} if "data" in swapped else set()):
        edited[group] = fresh[group]


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
