"""Finding the run that this same command had begun before its launcher (torchrun, Slurm) started it again."""

import os
from pathlib import Path

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.ground import started_by

_OF_COMMAND = ("resume=", "log_dir=", "ckpt_path=")  # overrides that are no part of a run


def of_run(overrides: list[str]) -> list[str]:
    """The overrides that are part of the run."""
    return [text for text in overrides if not text.startswith(_OF_COMMAND)]


def begun_before(overrides: list[str]) -> Path | None:
    """The folder of the run that this command began before it was started again; None where it is not a restart."""
    if started_by.leader is not None and started_by.leader.begun is not None:
        return Path(started_by.leader.begun)
    name, restarts = started_by.start()
    if not restarts:
        return None
    ours = of_run(overrides)
    log_dir = compose("train", [text for text in overrides if text.startswith("log_dir=")], check=False).config.log_dir
    for folder in runs.folders(log_dir):
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            continue
        begun = runs.read_summary(folder).get("start")
        if isinstance(begun, dict) and begun.get("of") == name and of_run(begun.get("overrides") or []) == ours:
            return folder
    return None
