"""The groups and keys of a verb, for `--help`."""

import json
import textwrap

from omegaconf import DictConfig, OmegaConf

from boltlab.config import project
from boltlab.config.roots import ROOTS
from boltlab.config.sources import config_dirs, groups
from boltlab.ground.errors import ConfigError, Mistake


def help_text(verb: str) -> str:
    """The groups of a verb with their choices, and its root keys with their defaults; reads YAML files only."""
    fields = ROOTS[verb].__dataclass_fields__
    defaults = _primary(project.config_name(verb))
    entries = defaults.pop("defaults", [])
    for inherited in [entry for entry in entries if entry in ROOTS]:
        parent = _primary(inherited)
        entries += parent.pop("defaults")
        parent.merge_with(defaults)
        defaults = parent
    listed = {str(k).split()[-1] for entry in entries if isinstance(entry, DictConfig) for k in entry}
    lines = []
    for group, choices in groups().items():
        if group in listed and choices:
            text = textwrap.fill(" ".join(choices), 84, subsequent_indent=" " * 13)
            lines.append(f"  {group:<11}{text}")
    keys = [f"  {key}={_yaml_value(defaults, key)}" for key in fields if key in defaults and key not in listed]
    parts = ["Groups: take a choice with group=choice, change one of its keys with group.key=value", *lines, ""]
    return "\n".join([*(parts if lines else []), "Keys", *keys])


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
