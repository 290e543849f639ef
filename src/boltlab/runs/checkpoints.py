"""The checkpoints of a run: the best, the newest that is whole, and the file that `run=` means."""

import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch

from boltlab import runs
from boltlab.checkpoints.file import CheckpointError, verify
from boltlab.config.trust import paths_inside

_LAST = re.compile(r"last(?:-(\d+))?\.ckpt")


def find(folder: Path, which: str | None = None) -> Path:
    """The checkpoint of a run: `best`, `last`, or with None the best where one was chosen, else the last (printed).

    Raises:
        CheckpointError: the run has none of that name. Random weights are never used in its place.
    """
    last = folder / "checkpoints" / "last.ckpt"
    path = last if which == "last" else best(folder)
    if path is None and which is None and last.is_file():
        print(f"{runs.shown(folder)} has no best checkpoint: its last one is used", file=sys.stderr, flush=True)
        path = last
    if path is not None and path.is_file():
        return path
    if not any((folder / "checkpoints").glob("*.ckpt")):
        raise CheckpointError(f"the run {folder} has no checkpoint: was it stopped before its first epoch ended?")
    raise CheckpointError(
        f"the run {folder} has no {which or 'best or last'} checkpoint"
        + (": checkpoint=last takes the weights that it ended with" if which == "best" and last.is_file() else "")
    )


def best(folder: Path) -> Path | None:
    """The file that the run's ModelCheckpoint names as its `best_model_path`; None where it chose none.

    A finished run has written it down. Of any other the newest checkpoint knows it, for Lightning saves the state of
    its callbacks with each; a run whose checkpoints hold weights only has its best in `best.ckpt`.
    """
    summary = runs.read_summary(folder)
    if summary.get("status") == "finished" and isinstance(name := summary.get("best_checkpoint"), str):
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):  # a run folder from elsewhere may name any file
            raise CheckpointError(
                f"the best checkpoint of {folder} lies outside of it: init_from={path}, or checkpoint=last"
            )
        return folder / name if path.is_file() else None
    content = _newest(folder)
    states = paths_inside(folder, content.get("callbacks") or {}).values()
    found = [state for state in states if isinstance(state, dict) and state.get("monitor")]
    found = [state for state in found if "best_model_path" in state]
    monitor = (content.get("config") or {}).get("monitor")
    found.sort(key=lambda state: state["monitor"] != monitor)  # the run's own metric first
    if found:
        return Path(found[0]["best_model_path"]) if found[0]["best_model_path"] else None
    path = folder / "checkpoints" / "best.ckpt"
    return path if path.is_file() else None


def _newest(folder: Path) -> dict[str, Any]:
    """The content of the newest checkpoint that holds the state of callbacks; empty where none does."""
    newest: tuple[tuple[int, int], dict[str, Any]] = (-1, -1), {}
    for path in (folder / "checkpoints").glob("*.ckpt"):
        try:  # the tensors stay on the disk
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            age = (content["global_step"], path.stat().st_mtime_ns)
        except Exception:  # damaged: whoever reads it says so
            continue
        if content.get("callbacks") and age > newest[0]:
            newest = age, content
    return newest[1]


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run resumes from: the first of `last`, `last-1`, …, then the newest step, that is whole.

    Returns:
        The file, None where the run has no checkpoint; and a line for each damaged file that was passed over.

    Raises:
        CheckpointError: there are checkpoints, and training can go on from none of them; all are named.
    """
    damaged: dict[Path, str] = {}
    unusable: dict[Path, str] = {}
    taken, newest = None, -1
    for path in sorted((folder / "checkpoints").glob("*.ckpt"), key=_place):
        damage, hindrance, step = _examined(path)
        if damage:
            damaged[path] = damage
        elif hindrance:
            unusable[path] = hindrance
        elif taken is None or step > newest:
            taken, newest = path, step
            if _LAST.fullmatch(path.name):
                break
    if taken is None and damaged:
        reasons = "; ".join(f"{path.name} {why}" for path, why in (damaged | unusable).items())
        raise CheckpointError(f"{folder / 'checkpoints'}: training can go on from none of the files there: {reasons}")
    return taken, [
        f"the checkpoint {path} {why}; {taken.name} is taken instead" for path, why in damaged.items() if taken
    ]


def _place(path: Path) -> tuple[float, Path]:
    """Sorts `last`, `last-1`, … before all others."""
    match = _LAST.fullmatch(path.name)
    return int(match[1] or 0) if match else math.inf, path


def _examined(path: Path) -> tuple[str, str, int]:
    """How a checkpoint is damaged, why training cannot resume from it if it is not, and its step."""
    if problem := verify(path):
        return problem, "", 0
    try:  # nothing but names and plain values is read: the tensors stay on the disk
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return "holds more than tensors and plain values", "", 0
    if not {"optimizer_states", "loops"} <= content.keys():
        return "", "holds weights only", 0
    return "", "stands within accumulated batches" if _within_a_step(content) else "", content["global_step"]


def _within_a_step(content: dict[str, Any]) -> bool:
    """Whether gradients of accumulated batches are missing: `best` may be saved by a validation between two steps."""
    try:
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = content["config"]["trainer"]["accumulate_grad_batches"]
        return bool(progress["current"]["ready"] % batches) and not progress["is_last_batch"]
    except (KeyError, TypeError):
        return False


def which_file(run: str | Path, checkpoint: str | None = None, log_dir: str | Path = "logs") -> Path:
    """The file that `run` means: `latest`, a run folder, part of its name, a file, or the URL of a checkpoint."""
    if str(run).startswith(("http://", "https://")):
        from boltlab.checkpoints.fetch import fetch

        return fetch(str(run), Path(log_dir) / "fetched")
    is_file = Path(run).suffix == ".ckpt" or Path(run).is_file()
    return Path(run) if is_file else find(runs.find(str(run), log_dir), checkpoint)
