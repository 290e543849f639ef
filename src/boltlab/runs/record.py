"""The files of a run folder: what is written before, at and after a run, and reading it again.

logs/<verb>/<date>_<time>_<name>-<id>/
    config.yaml        the resolved config        environment.json   commit, hardware, packages
    overrides.yaml     what the command line said git.patch          uncommitted changes
    metrics.csv        every logged value         summary.json       status, final and best metrics, times
    classes.json       the class names            checkpoints/       best.ckpt, last.ckpt
    data.json          what data each split had
"""

import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import OmegaConfDumper, get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from boltlab.config import project, renamed
from boltlab.ground import credentials, started_by
from boltlab.ground.errors import UserError
from boltlab.ground.files import read_json, write_json, write_whole
from boltlab.ground.signals import Stopped, heard

if TYPE_CHECKING:
    from concurrent.futures import Future
from boltlab.runs.provenance import Git, ask_git, environment

_ALIAS = re.compile(r"(^|[\s\[{,:])\*\w", re.MULTILINE)  # a few of them make a file of a gigabyte
# Stands for the run folder in the saved config, so that a folder that was moved still reads right.
_HERE = "@RUN_DIR@"
UNBEGUN = ".unbegun"  # marks a folder whose run ended by a mistake of its config or data before there was a batch


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values only, with numbers and texts as OmegaConf reads them: 1e-3 is a number, a date is a text."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """Texts that would be read as something else in quotes, as OmegaConf writes them."""


_Dumper.add_representer(str, OmegaConfDumper.str_representer)


def prepare(
    folder: Path,
    config: DictConfig,
    overrides: list[str],
    git: "Future[Git] | None" = None,
    status: Literal["running", "queued"] = "running",
    **known: Any,
) -> DictConfig:
    """Writes into a new folder what is known before the run starts, `known` into its summary; returns its config as it
    is read again. `git` is asked here if it was not before.

    A queued run is started later, perhaps on another machine: its environment is written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / ".run").touch(exist_ok=False)  # of two at once, one
    except FileExistsError:
        raise UserError(f"{folder} holds a run already; each run gets a folder of its own") from None
    start = {"of": started_by.start()[0], "overrides": list(overrides)}
    write_summary(folder, **_begins(status), started=time.time(), start=start, **known)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=True), encoding="utf-8")
    if status == "running":
        _write_environment(folder, git)
    class_names = config.get("data", {}).get("class_names")
    if OmegaConf.is_list(class_names):
        (folder / "classes.json").write_text(json.dumps(list(class_names), ensure_ascii=False), encoding="utf-8")
    return write_config(folder, config)  # at the end: a folder without it is no run yet


def _begins(status: str) -> dict[str, Any]:
    return {"status": status, "pid": os.getpid(), "host": platform.node()}


def _write_environment(folder: Path, git: "Future[Git] | None") -> None:
    answer = (git or ask_git()).result()
    if answer.problem:
        warnings.warn(answer.problem, stacklevel=2)
    (folder / "environment.json").write_text(json.dumps(environment(answer), indent=1), encoding="utf-8")
    (folder / "git.patch").write_bytes(answer.patch)


def record_start(
    folder: Path, config: DictConfig, git: "Future[Git] | None" = None, written: bool = False
) -> DictConfig:
    """Writes that a queued run begins, here and now, and its config where that is not `written`; returns the config as
    it is read again."""
    _write_environment(folder, git)
    if not written:
        config = write_config(folder, config)
    write_summary(folder, **_begins("running"), reason=None, started=time.time())
    return config


def write_config(folder: Path, config: DictConfig) -> DictConfig:
    """Writes the resolved config, secrets as references, and sets its `run_dir`; returns it as it is read again."""
    config.run_dir = _HERE
    plain = credentials.plain(config)
    text = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False).replace(_HERE, "${run_dir}")
    write_whole(folder / "config.yaml", text, sync=True)
    config.run_dir = str(folder)
    return parse_config(folder, text, own=True)


def record_resume(
    folder: Path,
    config: DictConfig,
    overrides: list[str],
    checkpoint: str | None,
    changed: list[tuple[str, Any, Any]],
    git: "Future[Git] | None" = None,
) -> DictConfig:
    """Writes that a run resumes: its config as it is now, and in the summary what was changed, when and where; returns
    the config as it is read again."""
    config = write_config(folder, config)
    summary, commit = read_summary(folder), (git or ask_git()).result().commit
    this = {"time": time.time(), "host": platform.node(), "git_commit": commit, "checkpoint": checkpoint}
    this |= {"overrides": overrides, "changed": changed, "seconds": summary.get("seconds", 0.0)}
    start, restarts = started_by.start()
    began = {"start": {"of": start, "overrides": overrides}} if start and not restarts else {}
    write_summary(folder, **_begins("running"), reason=None, **began, resumed=[*summary.get("resumed", []), this])
    return config


def load_config(folder: Path, own: bool = False, replaced: Iterable[str] = ()) -> DictConfig:
    """The resolved config of a run, with `run_dir` where the folder stands now, and the data where the run found them.

    replaced: keys that the caller puts new values at; a reference to a secret there is left out, and where what stood
    there would write is no matter.

    A folder may come from anybody: what its config may build is checked against `boltlab.config.trust`, except for the
    `own` run of this command, whose config was composed here.

    Raises:
        UserError: no config, one that cannot be read, or one that asks for what is not trusted.
    """
    return parse_config(folder, config_text(folder), own, replaced)


def config_text(folder: Path) -> str:
    """What stands in the config.yaml of a run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}"[:500]) from e


def parse_config(folder: Path, text: str, own: bool = False, replaced: Iterable[str] = ()) -> DictConfig:
    """The config of a run out of the text of its config.yaml: see `load_config`."""
    path = folder / "config.yaml"
    try:
        if refers_to_itself(text):
            raise ValueError("it refers to its own parts (*name), which no config of ours does")
        # Both loaders make plain values only. The faster one, of what nobody else wrote: it fails on what is too deep.
        config = OmegaConf.create(yaml.load(text, PlainLoader) if own else text)
    except (ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}"[:500]) from e
    if not isinstance(config, DictConfig) or not config:
        raise UserError(f"{path} holds no config")
    if any(old in text for old in renamed.TARGETS):
        config = cast(DictConfig, OmegaConf.create(renamed.current(OmegaConf.to_container(config))))
    config.pop("steps_per_execution", None)  # of older versions: several steps at a time, equal to single ones
    credentials.forget_references(config, replaced)
    if not own:
        from boltlab.config.trust import refuse_untrusted
        from boltlab.runs import data_places

        project.refuse_another(read_json(folder / "environment.json").get("project"), str(folder))
        refuse_untrusted(config, path, given=replaced)
        data_places.settle(config, folder)
    config.run_dir = str(folder.resolve())
    return config


def refers_to_itself(text: str) -> bool:
    """Whether a YAML text has an alias, `*name`."""
    return bool(_ALIAS.search(text)) and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))


def write_summary(folder: Path, **values: Any) -> dict[str, Any]:
    """Adds values to `summary.json`, whole or not at all."""
    summary = {**read_summary(folder), **values}
    write_json(folder / "summary.json", summary, sync=True)
    return summary


def end(folder: Path, **values: Any) -> dict[str, Any]:
    """Writes how a run ended, with the time that it took."""
    ended, summary = time.time(), read_summary(folder)
    before = summary.get("resumed")  # the time between does not count
    began = before[-1]["time"] - before[-1]["seconds"] if before else summary.get("started", ended)
    return write_summary(folder, ended=ended, seconds=round(ended - began, 2), **values)


def reason(error: BaseException) -> str:
    """The first line of what an error says; of the mistakes of a config, all of them."""
    mistakes = [f"{m.where}: {m.message}" for m in getattr(error, "mistakes", [])]
    text = "; ".join(mistakes) or getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
    return credentials.masked(str(text).splitlines()[0][:500])


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Writes into the summary that what runs inside was interrupted, or failed and why; the error goes on.

    Where the summary itself cannot be written, on a full disk, the error that ended the run is the one to tell of.
    """
    try:
        with heard():
            yield
    except Stopped as e:
        with suppress(OSError):
            end(folder, status="interrupted", reason=str(e))
        raise
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
        with suppress(OSError):
            end(folder, status="interrupted")
        raise KeyboardInterrupt from None
    except BaseException as e:
        with suppress(OSError):
            end(folder, status="failed", reason=reason(e), error=type(e).__name__)
        raise


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json`; of one that is broken what else tells of it, or nothing; nothing where there is none."""
    content = read_json(folder / "summary.json")
    if content or not (folder / "summary.json").is_file():
        return sound(content)
    from boltlab.runs import lost_summary

    return lost_summary.known(folder)


def sound(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary, which may come from anybody, without what is not of the kind that is read by its key."""
    return {key: value for key, value in summary.items() if _sound(key, value)}


def _sound(key: str, value: Any) -> bool:
    if key in ("started", "ended", "seconds", "fit_seconds", "samples_per_second", "data_wait_share"):
        return _number(value)
    if key in ("best", "final", "test"):
        return isinstance(value, dict) and all(map(_number, value.values()))
    if key in ("pid", "epochs", "steps", "skipped_steps", "processes"):
        return isinstance(value, int) and abs(value) < 1e15
    if key == "resumed":
        kept = ("time", "seconds")
        return isinstance(value, list) and all(
            isinstance(r, dict) and all(_number(r.get(k)) for k in kept) for r in value
        )
    return not isinstance(value, str) or value.isprintable()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and (abs(value) < 1e15 or isinstance(value, float))
