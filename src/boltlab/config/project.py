"""The project that a command belongs to: its configs, its package, and whether it is trusted.

A project is a folder whose pyproject.toml has a table `[tool.boltlab]`. It is found from the current folder upwards,
else it is the one that the variable BOLTLAB_PROJECT names:

    [tool.boltlab]
    package = "cells"     # the name in [project] where it is left out
    configs = "configs"   # searched before the engine's configs

Anybody can write these lines into an archive, so they prove nothing. A project is trusted where its folder was
installed editable into this Python (`pip install -e`), the package is imported from below it, and it lies outside of
every log and run folder. `trusted=[package]` on the command line trusts a package that can only be imported.
"""

import importlib.util
import json
import os
import re
import site
import sysconfig
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from boltlab.ground.errors import ConfigError, Mistake, UserError

# Options of the command line, which the processes that it starts inherit.
_TRUSTED, _CONFIG_DIR, _CONFIG_NAME = "BOLTLAB_TRUSTED", "BOLTLAB_CONFIG_DIR", "BOLTLAB_CONFIG_NAME"
_FLAGS = {"--config-dir": _CONFIG_DIR, "-cd": _CONFIG_DIR, "--config-name": _CONFIG_NAME, "-cn": _CONFIG_NAME}


@dataclass(frozen=True)
class Project:
    """A folder with `[tool.boltlab]`. name and version: of the installed distribution; where it is not installed, the
    package's name and None."""

    root: Path
    name: str
    package: str
    configs: Path
    version: str | None
    problem: str | None  # why it is not trusted

    @property
    def trusted(self) -> bool:
        return self.problem is None


def find(start: Path | None = None) -> Project | None:
    """The project of the current folder or of the nearest one above it; those in run and log folders are passed over.

    Raises:
        UserError: its `[tool.boltlab]` cannot be read, or BOLTLAB_PROJECT names a folder without it.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        table = _table(folder)
        if table is not None and not in_logs(folder):
            return _project(folder, *table)
    if not (named := os.environ.get("BOLTLAB_PROJECT")):
        return None
    root = Path(named).resolve()
    if (table := _table(root)) is None:
        raise UserError(f"BOLTLAB_PROJECT={named}: there is no pyproject.toml with [tool.boltlab]")
    return _project(root, *table)


def current(verb: str, needed: bool = True) -> Project | None:
    """The project of this command, for composing a new config; `--config-dir` does without one.

    Raises:
        UserError: it is needed and there is none, or it is not trusted: its configs could have any code run.
    """
    project = find()
    if project is None and needed and _CONFIG_DIR not in os.environ:
        raise UserError(
            f"boltlab {verb} composes a config from those of a project, and no folder from here upwards is one: its"
            " pyproject.toml has [tool.boltlab]. Change into yours, or make one: boltlab new ../cells"
        )
    if project is not None and not project.trusted:
        raise UserError(
            f"the project {project.root} is not trusted: {project.problem}. Whoever sent it could run any code by its"
            f" configs; if it is yours: pip install --no-deps -e {project.root}, or trusted=[{project.package}]"
        )
    return project


def config_dirs() -> list[Path]:
    """The config folders that are searched before the engine's, the first one first."""
    project, added = find(), os.environ.get(_CONFIG_DIR)
    own = [project.configs] if project is not None and project.trusted and project.configs.is_dir() else []
    return [*own, *([Path(added)] if added else [])]


def config_name(verb: str) -> str:
    """The primary config of a verb: its own name, or that of `--config-name`."""
    of, _, name = os.environ.get(_CONFIG_NAME, "").partition("=")
    return name if of == verb and name else verb


def named() -> tuple[str, ...]:
    """What `trusted=` of the command line names."""
    return tuple(filter(None, os.environ.get(_TRUSTED, "").split(",")))


def packages() -> tuple[str, ...]:
    """The packages that are trusted beside the engine's own: of `trusted=`, and of every installed project."""
    return (*named(), *(project.package for project in _installed()))


def refuse_another(recorded: Any, run: str) -> None:
    """Refuses a run of a project that is another than the one whose package has that name here.

    Args:
        recorded: what environment.json of the run says of its project.

    Raises:
        UserError: the classes of the one here would be built in place of those that were trained.
    """
    said = recorded if isinstance(recorded, dict) else {}
    package, name = said.get("package"), said.get("name")
    here = next((project for project in _installed() if project.package == package), None)
    if here and name and name != here.name and package not in named():
        raise UserError(
            f"{run} is a run of the project {name!r}; its package {package!r} is that of {here.name!r} here, whose"
            f" classes may be others: install {name!r} instead, or, if they are the same, trusted=[{package}]"
        )


def _installed() -> Iterator[Project]:
    """The projects that are installed here and trusted."""
    found = (_project(root, *table) for _, root in _editable() if (table := _table(root)))
    yield from (project for project in found if project.trusted)


@contextmanager
def options(verb: str, arguments: list[str]) -> Iterator[list[str]]:
    """The arguments without `trusted=`, `--config-dir` and `--config-name`, which hold as long as the context is open.

    Raises:
        ConfigError: one of them names nothing.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "trusted" and equals:
            given[_TRUSTED] = _importable(value)
        elif flag in _FLAGS:
            given[_FLAGS[flag]] = _named_by(flag, value if equals else next(words, ""), verb)
        else:
            rest.append(word)
    before = {name: os.environ[name] for name in given if name in os.environ}
    os.environ.update(given)
    try:
        yield rest
    finally:
        for name in given:
            os.environ.pop(name, None)
        os.environ.update(before)


def _named_by(flag: str, value: str, verb: str) -> str:
    if not value:
        raise ConfigError([Mistake(flag, "names nothing")])
    if _FLAGS[flag] == _CONFIG_NAME:
        return f"{verb}={value.removesuffix('.yaml')}"
    if not Path(value).is_dir():
        raise ConfigError([Mistake(f"{flag} {value}", "there is no such folder")])
    return str(Path(value).resolve())


def _importable(text: str) -> str:
    names = [name.strip() for name in text.strip("[]'\" ").split(",")]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
            raise ConfigError([Mistake(f"trusted={text}", f"{name!r} is no name of a package: trusted=[cells]")])
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ConfigError([Mistake(f"trusted={text}", f"no package {name!r} can be imported; is it installed?")])
    return ",".join(names)


def _table(folder: Path) -> tuple[str, str] | None:
    """`package` and `configs` of the folder's pyproject.toml; None where it has no `[tool.boltlab]`."""
    path = folder / "pyproject.toml"
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _read(path: Path, _: int) -> tuple[str, str] | None:
    text = path.read_text(encoding="utf-8", errors="replace")
    if "tool.boltlab" not in text:
        return None
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    table = content.get("tool", {}).get("boltlab")
    if not isinstance(table, dict):
        return None
    package = table.get("package", str(content.get("project", {}).get("name", "")).replace("-", "_"))
    configs = table.get("configs", "configs")
    if not isinstance(package, str) or not package.isidentifier():
        raise UserError(f"{path}: [tool.boltlab] package={package!r} is no name of a package")
    if not isinstance(configs, str) or Path(configs).is_absolute() or ".." in Path(configs).parts:
        raise UserError(f"{path}: [tool.boltlab] configs={configs!r} is no folder below the project")
    return package, configs


def _project(root: Path, package: str, configs: str) -> Project:
    distribution = next((found for found, where in _editable() if where == root), None)
    problem = None
    if distribution is None and package not in named():
        problem = "it is not installed editable in this Python"
    elif not _imported_from(package, root):
        problem = f"the package {package!r} is not imported from below it"
    elif in_logs(root):
        problem = "it lies in a log or run folder"
    name, version = (distribution.name, distribution.version) if distribution else (package, None)
    return Project(root, name, package, root / configs, version, problem)


def _editable() -> Iterator[tuple[PathDistribution, Path]]:
    """Each distribution that is installed editable, with its folder. Only the installer's own folders count: a
    `.dist-info` in an archive is on sys.path as well where a command is run in it."""
    folders = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders |= {site.getusersitepackages()} if site.ENABLE_USER_SITE else set()
    for folder in map(Path, sorted(folders)):
        if folder.is_dir():
            yield from _editable_in(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _editable_in(folder: Path, _: int) -> tuple[tuple[PathDistribution, Path], ...]:
    found = []
    for path in sorted(folder.glob("*.dist-info/direct_url.json")):
        try:
            said = json.loads(path.read_bytes())
            url, editable = urlsplit(said["url"]), said["dir_info"]["editable"]
        except (OSError, ValueError, KeyError, TypeError):  # of a URL or an archive
            continue
        if url.scheme == "file" and editable is True:
            found.append((PathDistribution(path.parent), Path(url2pathname(url.path)).resolve()))
    return tuple(found)


def _imported_from(package: str, root: Path) -> bool:
    """Whether a package comes from below a folder; it is not imported here."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
    return bool(places) and all(Path(place).resolve().is_relative_to(root) for place in places)


def in_logs(folder: Path) -> bool:
    """Whether a folder lies in a run folder, or below a log folder."""
    below = (path for top in folder.parents for verb in ("train", "eval") for path in top.glob(f"{verb}/*/config.yaml"))
    return any(map(_is_run, (folder, *folder.parents))) or any(_is_run(path.parent) for path in below)


def _is_run(folder: Path) -> bool:
    marks = (folder / "summary.json", folder / ".run")
    return (folder / "config.yaml").is_file() and any(mark.is_file() for mark in marks)
