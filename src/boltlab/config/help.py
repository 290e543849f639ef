"""The groups and keys of a verb, for `--help`."""

import json
import textwrap
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab.config import project
from boltlab.config.roots import ROOTS
from boltlab.config.sources import groups, primary


def help_text(verb: str) -> str:
    """The groups of a verb with their choices, and its root keys with their defaults; reads YAML files only."""
    fields = ROOTS[verb]
    defaults, entries = _inherited(project.config_name(verb))
    listed = {str(k).split()[-1] for entry in entries if isinstance(entry, DictConfig) for k in entry}
    lines = []
    for group, choices in groups().items():
        if group in listed and choices:
            text = textwrap.fill(" ".join(choices), 84, subsequent_indent=" " * 13)
            lines.append(f"  {group:<11}{text}")
    keys = [f"  {key}={_shown(defaults, key)}" for key in fields if key in defaults and key not in listed]
    parts = ["Groups: take a choice with group=choice, change one of its keys with group.key=value", *lines, ""]
    return "\n".join([*(parts if lines else []), "Keys", *keys])


def _inherited(name: str) -> tuple[DictConfig, list[Any]]:
    """A primary config over those that its defaults list names, without these lists; and the entries of all of them."""
    config = primary(name)
    entries = list(config.pop("defaults", []))
    for parent in [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]:
        below, more = _inherited(parent)
        below.merge_with(config)
        config, entries = below, entries + more
    return config, entries


def _shown(node: DictConfig, key: str) -> str:
    return "???" if OmegaConf.is_missing(node, key) else json.dumps([] if OmegaConf.is_config(node[key]) else node[key])
