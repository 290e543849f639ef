"""Runs that a launcher starts (`launcher=slurm`): made here, whole and checked, and queued.

A launcher has `run(top, start, watch, entry)`, which gives each run folder of `start` a process that calls `entry`
(module:function) with it, and returns when these have ended; and `watches`: whether it waits for those too (`watch`)
that an earlier command started. One that may end before its jobs has `wait`, whether it stays, and `states`, for
`boltlab.runs.job_states`.
What a run is does not depend on who starts it: the launcher is no part of its config.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from boltlab import runs
from boltlab.config import auto as machine
from boltlab.config.build import build
from boltlab.config.compose import Composed, compose
from boltlab.config.edit import edit
from boltlab.config.overrides import names_launcher
from boltlab.ground import started_by
from boltlab.ground.errors import ConfigError, Mistake, UserError


def take(jobs: list[Composed]) -> Any:
    """The launcher of these jobs, built; in their configs and overrides, nothing of it is left. None: there is none.

    Raises:
        ConfigError: it is not the same one for all jobs.
        UserError: a package, or the cluster, is not there.
    """
    nodes: list[Any] = []
    for job in jobs:
        node = job.config.launcher
        nodes.append(node and OmegaConf.to_container(node, resolve=True))
        del job.config["launcher"]
        job.overrides = [text for text in job.overrides if not names_launcher(text)]
    for node in nodes:
        if node != nodes[0]:
            keys = [key for key in nodes[0] or {} if (node or {}).get(key) != nodes[0][key]] or ["_target_"]
            message = "is not the same in all jobs; a sweep asks for one kind of job: give two commands"
            raise ConfigError([Mistake(f"launcher.{keys[0]}", message)])
    if nodes[0] is None:
        return None
    if (outside := started_by.outside()) is not None:
        where = f"by one process; {outside.launcher} has started {outside.size}"
        raise ConfigError([Mistake("launcher", f"is asked {where}: leave one of the two out")])
    return build({"launcher": nodes[0]}, "launcher")


def statuses(folders: list[Path | None]) -> list[runs.Status]:
    """What each of these runs of ours is: one that is queued is so in a cluster, or nowhere."""
    known = runs.job_states(filter(None, folders))

    def status(folder: Path | None) -> runs.Status:
        if folder is None:
            return runs.Status.NOT_STARTED
        found = runs.status(runs.read_summary(folder), folder, known.get(folder))
        return runs.Status.NOT_STARTED if found == "queued" and folder not in known else found

    return list(map(status, folders))


def queue(job: Composed, folder: Path, name: str, auto: Iterable[str] | None = None) -> None:
    """Makes the run in `folder`, for a process to begin it later. auto: the keys that the machine it comes to is to
    choose, by default those that its command leaves at auto; none where it comes to this machine."""
    if auto is None:
        asked = compose("train", job.overrides, check=False).config
        auto = [key for key in machine.KEYS if asked[key] == "auto"]
    job.config.update({**dict.fromkeys(auto, "auto"), "launcher": None})
    folder.mkdir(parents=True, exist_ok=True)
    with runs.lock(folder):
        chosen = {key: job.choices.get(key) for key in ("data", "model")}
        runs.prepare(folder, job.config, job.overrides, status="queued", name=name, **chosen)


def run(job: Composed, name: str, entry: str) -> Path:
    """Starts one run by its launcher, which is to call `entry` with its folder, and returns the folder.

    Raises:
        UserError: it could not be started, and no folder is left; or it failed.
    """
    launcher = take([job])
    folder = runs.new_folder(job.config.log_dir, "train", name)
    queue(job, folder, name)
    try:
        launcher.run(folder, [folder], [], entry)
    except UserError:
        if runs.read_summary(folder).get("status") == "queued" and not (folder / "job.json").exists():
            shutil.rmtree(folder)
        raise
    return _ended(folder, launcher)


def resume(folder: Path, overrides: list[str], entry: str) -> Path:
    """Goes on with a run by a launcher, or watches it where it is at work; returns its folder.

    Raises:
        UserError: more was to be changed than the launcher; or the run failed.
    """
    others = [text for text in overrides if not names_launcher(text)]
    if others:
        raise UserError(f"{others[0]}: resume=… with a launcher changes nothing else; leave the launcher out, or this")
    config = edit(runs.load_config(folder), overrides)
    launcher = take([Composed("train", config, [])])
    if launcher is None:
        raise UserError("launcher=null is what resume=… does by itself: leave it out")
    (status,) = statuses([folder])
    if status == "finished":
        raise UserError(f"{runs.shown(folder)} is finished; to make it longer, leave the launcher out")
    if status.at_work and not launcher.watches:
        raise UserError(f"{runs.shown(folder)} is {status} already")
    at_work = status.at_work
    launcher.run(folder, [] if at_work else [folder], [folder] if at_work else [], entry)
    return _ended(folder, launcher)


def _ended(folder: Path, launcher: Any) -> Path:
    summary = runs.read_summary(folder)
    status = runs.status(summary, folder)
    if status != "finished" and getattr(launcher, "wait", True):
        raise UserError(f"{runs.shown(folder)} {status}: {summary.get('reason') or 'no reason is known'}")
    return folder
