"""`boltlab train`: fit, then test with the best checkpoint."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.config.overrides import names_launcher
from boltlab.ground import signals, started_by
from boltlab.ground.errors import ConfigError, Mistake
from boltlab.processes import launch
from boltlab.processes.restarted import begun_before, of_run
from boltlab.training import start
from boltlab.training.outcome import print_end

if TYPE_CHECKING:
    from concurrent.futures import Future


def main(overrides: list[str]) -> int:
    """Trains once, or resumes a run that was stopped (`resume=…`)."""
    with signals.caught():
        launch.expect(overrides)
        git = runs.ask_git()  # answers while `compose` imports torch
        begun = begun_before(overrides)
        if begun is not None:
            _restart(begun, git)
        elif (folder := _to_resume(overrides)) is not None:
            _resume(folder, of_run(overrides), git)
        else:
            _train(overrides, git)
    return 0


def _restart(folder: Path, git: "Future[runs.Git]") -> None:
    if runs.status(runs.read_summary(folder), folder) == "finished":
        print(f"{runs.shown(folder)} was finished before this command was started again", flush=True)
    else:
        start.resume_run(folder, [], git, own=True)


def _to_resume(overrides: list[str]) -> Path | None:
    """The run that `resume=` names."""
    given = [text for text in overrides if text.startswith("resume=")]
    if not given:
        return None
    if both := [text for text in overrides if text.startswith("ckpt_path=")]:
        raise ConfigError([Mistake(both[-1], "begins a new run, and resume=… continues one: leave one of the two out")])
    options = compose("train", [text for text in overrides if text not in of_run(overrides)], check=False).config
    name = given[-1].partition("=")[2].strip("'\"")
    return None if options.resume is None else runs.find(name, options.log_dir, option="resume")


def _resume(folder: Path, overrides: list[str], git: "Future[runs.Git]") -> None:
    if any(map(names_launcher, overrides)):
        from boltlab.processes import submit

        print_end(submit.resume(folder, overrides, start.JOB))
    else:
        start.resume_run(folder, overrides, git)


def _train(overrides: list[str], git: "Future[runs.Git]") -> None:
    given = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith("ckpt_path=")]
    composed = compose("train", [text for text in overrides if not text.startswith("ckpt_path=")])
    start.say_unused(composed)
    start.settle_weights(composed)
    name = start.name_of(composed)
    if composed.config.launcher is not None:
        from boltlab.processes import submit

        print_end(submit.run(composed, name, start.JOB))
        return
    state = start.state_of(Path(given[-1]), composed.config) if given and given[-1] != "null" else None
    folder = runs.new_folder(composed.config.log_dir, "train", name)
    try:
        start.run(composed, folder, git, state)
    finally:
        if (folder / runs.UNBEGUN).exists() and started_by.leader is None:  # else other processes may write into it
            shutil.rmtree(folder)
