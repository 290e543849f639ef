"""The folders that configs are read from, and the choices in them."""

import functools
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from boltlab.config import project
from boltlab.ground.errors import ConfigError, Mistake

_LISTS = ("default", "eval")  # choices that are lists of others
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"  # the engine's own


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


def not_chosen(group: str) -> str:
    """What to say where a group that is needed has no choice."""
    known = groups()
    recipes = ", ".join(known.get("experiment", [])) if group in ("data", "model") else ""
    recipes = f"; an experiment chooses it too: {recipes}" if recipes else ""
    return f"is no choice; choices: {', '.join(known.get(group, [])) or 'none yet'}{recipes}"


def targets(group: str) -> list[str]:
    """The classes that the choices of a group build."""
    files = [path for folder in config_dirs() for path in sorted((folder / group).glob("*.yaml"))]
    found = [re.search(r"^_target_: *([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE) for path in files]
    return list(dict.fromkeys(match[1] for match in found if match))


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
    _stand_in_for_what_is_missing()


def _stand_in_for_what_is_missing() -> None:
    """An optional feature goes away with its YAML: a list of defaults that names it passes over it, with a line."""
    from hydra.core.config_store import ConfigStore

    lists = [path for folder in config_dirs() for name in _LISTS for path in folder.glob(f"*/{name}.yaml")]
    for path in lists:
        content: Any = {}
        with suppress(Exception):  # Hydra says what is wrong with a file, where it is chosen
            content = yaml.safe_load(path.read_bytes())
        entries = content.get("defaults") if isinstance(content, dict) else []
        names = [str(entry) for entry in entries if entry != "_self_"] if isinstance(entries, list) else []
        for name in filter(re.compile(r"[\w-]+").fullmatch, names):
            if not any((folder / path.parent.name / f"{name}.yaml").is_file() for folder in config_dirs()):
                print(f"{path.parent.name}={path.stem} names {name}, which is not there: skipped", file=sys.stderr)
                ConfigStore.instance().store(name, {}, group=path.parent.name)


def primary(name: str) -> DictConfig:
    """The primary config of that name as its file has it; no defaults are composed.

    Raises:
        ConfigError: there is none.
    """
    found = next((path for folder in config_dirs() if (path := folder / f"{name}.yaml").is_file()), None)
    config = OmegaConf.load(found) if found else None
    if not isinstance(config, DictConfig):
        raise ConfigError([Mistake(f"--config-name {name}", f"{found or f'no {name}.yaml'} holds no config")])
    return config
