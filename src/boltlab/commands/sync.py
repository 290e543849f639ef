"""`boltlab sync`: uploads W&B runs that were recorded offline, oldest first, by `wandb sync`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.ground import credentials
from boltlab.ground.errors import ConfigError, Mistake, UserError

_NAME = re.compile(r"offline-run-(\d{8}_\d{6})-(.+)")  # when it began, and the id of the W&B run
SYNCED, READY = "synced already", "would be sent"  # states of a part


@dataclass(frozen=True, order=True)
class Part:
    """What one process has recorded of a W&B run; a run that was resumed has several, which share its id."""

    start: str
    id: str
    folder: Path  # <run folder>/wandb/offline-run-…

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    @property
    def synced(self) -> bool:
        return any(self.folder.glob("*.wandb.synced"))  # wandb's own mark

    @cached_property
    def state(self) -> str:
        """SYNCED, READY, or why it is held back."""
        if self.synced:
            return SYNCED
        if not any(self.folder.glob("*.wandb")):
            return "holds no .wandb file"
        status = runs.status(runs.read_summary(self.run), self.run)
        return "is running: sync it when it has ended" if status == "running" else READY


def main(words: list[str]) -> int:
    """`boltlab sync [run …|all] [dry_run=true]`; fails where a run could not be sent."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    options = compose("sync", overrides).config
    names = [word for word in words if word not in overrides] or list(options.runs)
    if not names:
        raise ConfigError([Mistake("runs", "is empty: boltlab sync all, or the names of runs")])
    parts = sorted({part for name in names for part in _parts(name, options.log_dir)})
    if not parts:
        print("nothing was recorded offline by W&B there")
        return 0
    return sync(parts, options.dry_run)


def sync(parts: list[Part], dry_run: bool) -> int:
    """Prints the state of each part, and sends those that are ready."""
    done, ready = ([part for part in parts if part.state == state] for state in (SYNCED, READY))
    held = [part for part in parts if part not in done + ready]
    for part in done + held + (ready if dry_run else []):
        _say(part, part.state)
    failed = _send(ready) if ready and not dry_run else 0
    sent = f"{len(ready)} would be sent" if dry_run else f"{len(ready) - failed} sent"
    left = [f"{count} {what}" for count, what in ((len(held), "left"), (failed, "failed")) if count]
    print(", ".join([sent, f"{len(done)} {SYNCED}", *left]))
    return 1 if failed else 0


def _parts(name: str, log_dir: str) -> Iterator[Part]:
    """Everything that `all`, a run or a sweep has recorded offline."""
    tops = [Path(log_dir) / verb for verb in ("train", "eval")] if name == "all" else [_folder(name, log_dir)]
    for top in tops:
        for pattern in ("wandb/*", "*/wandb/*", "*/*/wandb/*"):
            for folder in top.glob(pattern):
                if (match := _NAME.fullmatch(folder.name)) and folder.is_dir():
                    yield Part(match[1], match[2], folder.resolve())


def _folder(name: str, log_dir: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return runs.find(name, log_dir)
    except UserError:
        others = [path for path in (Path(log_dir) / "train").glob("*/") if not (path / "config.yaml").exists()]
        fitting = [path for path in (*others, *runs.folders(log_dir, "eval")) if name in path.name]
        if len(fitting) != 1:
            raise
        return fitting[0]


def _send(waiting: list[Part]) -> int:
    """Sends each run, all its parts in order and in one call of wandb; returns how many parts failed."""
    import wandb

    from boltlab.loggers.wandb_server import refusal

    os.environ["WANDB_MODE"] = "online"  # a node that records offline may say otherwise
    wandb.setup(wandb.Settings(silent=True))
    if problem := refusal(timeout_seconds=10.0):
        raise UserError(f"W&B takes no run ({problem}): nothing was sent")
    failed = 0
    for run in dict.fromkeys(part.id for part in waiting):
        parts = [part for part in waiting if part.id == run]
        # Its exit code is 0 where a part was not sent.
        command = [sys.executable, "-m", "wandb", "sync", *(str(part.folder) for part in parts)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        for part in parts:
            if part.synced:
                _say(part, "sent")
            else:
                failed += 1
                _say(part, f"failed: {_reason(done.stdout + done.stderr)}")
    return failed


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["wandb sync does not say why"]
    errors = [line for line in lines if re.search(r"\berror\b|^panic|failed", line, re.IGNORECASE)]
    return credentials.masked((errors or lines)[-1].removeprefix("wandb: "))[:300]


def _say(part: Part, what: str) -> None:
    print(f"{runs.shown(part.folder)}  {what}", flush=True)
