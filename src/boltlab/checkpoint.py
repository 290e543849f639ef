"""The checkpoints of a run: saving them for Lightning, finding them, and making a model of one.

What one file is and how it is written and read stands in `checkpoint_file`.
"""

import copy
import inspect
import pickle
import re
import shutil
import sys
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from boltlab import runs
from boltlab.checkpoints.file import (
    CheckpointError,
    check_folder,
    clean_leftovers,
    megabytes,
    plain,
    read,
    verify,
    whole,
    write,
)
from boltlab.config.build import build
from boltlab.config.check import locate
from boltlab.config.trust import paths_inside, refuse_untrusted
from boltlab.models.schedulers import Schedule
from boltlab.models.task import Task

__all__ = [
    "CheckpointError",
    "SafeCheckpointIO",
    "best",
    "check_folder",
    "clean_leftovers",
    "fetch",
    "find",
    "fitted",
    "load",
    "newest_good",
    "plain",
    "read",
    "restore",
    "verify",
    "which_file",
    "write",
]


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin: plain content, whole files, a hash in each.

    Args:
        config: the resolved config as plain values; it travels in every checkpoint.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint; an error leaves what stood at `path` as it was.

        Noted hyperparameters that are no plain values (a net, a partial) are left out: `config` describes them.
        """
        write({**_plain_hyperparameters(checkpoint), "config": self.config}, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint that passes its hash; anything but tensors and plain values is refused."""
        return read(Path(path), map_location=map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Removes one file: Lightning's own removes a folder with all below it, where a foreign state names one."""
        if Path(path).is_file():
            Path(path).unlink()


def _plain_hyperparameters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    kept = dict(checkpoint)
    for key in _HYPERPARAMETERS & kept.keys():
        noted = kept.pop(key)
        if isinstance(noted, dict):
            kept[key] = {name: value for name, value in noted.items() if _is_plain(value)}
        elif _is_plain(noted):
            kept[key] = noted
    return kept


_HYPERPARAMETERS = {f"{part}{key}" for part in ("", "datamodule_") for key in ("hyper_parameters", "hparams_type")}


def _is_plain(value: Any) -> bool:
    try:
        plain(value)
    except CheckpointError:
        return False
    return True


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
    newest: tuple[tuple[int, int], dict[str, Any]] | None = None
    for path in (folder / "checkpoints").glob("*.ckpt"):
        try:  # the tensors stay on the disk
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            age = (content["global_step"], path.stat().st_mtime_ns)
        except Exception:  # damaged: whoever reads it says so
            continue
        if content.get("callbacks") and (newest is None or age > newest[0]):
            newest = age, content
    if newest is not None:
        config, states = newest[1].get("config") or {}, paths_inside(folder, newest[1]["callbacks"])
        found = [state for state in states.values() if isinstance(state, dict) and state.get("monitor")]
        found = [state for state in found if "best_model_path" in state]
        found.sort(key=lambda state: state["monitor"] != config.get("monitor"))  # the run's own metric first
        if found:
            return Path(found[0]["best_model_path"]) if found[0]["best_model_path"] else None
    path = folder / "checkpoints" / "best.ckpt"
    return path if path.is_file() else None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from: the first of `last`, `last-1`, …, then the newest step, that is whole.

    Returns:
        The file, None where the run has no checkpoint; and a line for each damaged file that was passed over.

    Raises:
        CheckpointError: there are checkpoints, and training can go on from none of them; all are named.
    """
    files = sorted((folder / "checkpoints").glob("*.ckpt"))
    family = {int(m[1] or 0): f for f in files if (m := re.fullmatch(r"last(?:-(\d+))?\.ckpt", f.name))}
    damaged: dict[Path, str] = {}
    unusable: dict[Path, str] = {}
    others: list[tuple[int, Path]] = []
    taken = None
    for path in [*(family[i] for i in sorted(family)), *(f for f in files if f not in family.values())]:
        if problem := verify(path):
            damaged[path] = problem
            continue
        try:  # nothing but names and plain values is read: the tensors stay on the disk
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            damaged[path] = "holds more than tensors and plain values"
            continue
        if not {"optimizer_states", "loops"} <= content.keys():
            unusable[path] = "holds weights only"
        elif _within_a_step(content):
            unusable[path] = "stands within accumulated batches"
        elif path in family.values():
            taken = path
            break
        else:
            others.append((content["global_step"], path))
    if taken is None and others:
        taken = max(others, key=lambda other: other[0])[1]
    if taken is None and damaged:
        reasons = "; ".join(f"{path.name} {why}" for path, why in (damaged | unusable).items())
        raise CheckpointError(f"{folder / 'checkpoints'}: training can go on from none of the files there: {reasons}")
    return taken, [
        f"the checkpoint {path} {why}; {taken.name} is taken instead" for path, why in damaged.items() if taken
    ]


def _within_a_step(content: dict[str, Any]) -> bool:
    """Whether gradients of accumulated batches are missing: `best` may be saved by a validation between two steps."""
    try:
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        batches = content["config"]["trainer"]["accumulate_grad_batches"]
        return bool(progress["current"]["ready"] % batches) and not progress["is_last_batch"]
    except (KeyError, TypeError):
        return False


def which_file(run: str | Path, checkpoint: str | None = None, log_dir: str | Path = "logs") -> Path:
    """The file that `run` means: `latest`, a run folder, part of its name, a checkpoint file, or the URL of one."""
    if str(run).startswith(("http://", "https://")):
        return fetch(str(run), Path(log_dir) / "fetched")
    return Path(run) if Path(run).suffix == ".ckpt" else find(runs.find(str(run), log_dir), checkpoint)


def fetch(url: str, folder: Path, timeout_seconds: float = 30.0) -> Path:
    """Downloads a checkpoint into `folder`, whole or not at all; it is as little trusted there as any other file.

    Raises:
        CheckpointError: no http address, no answer, or an answer that ends early; the message names the address.
    """
    if not url.startswith(("http://", "https://")):
        raise CheckpointError(f"{url} is no http or https address")
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:
            last = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
            path = folder / (re.sub(r"[^\w.=-]+", "_", last).strip(".").removesuffix(".ckpt") + ".ckpt")
            expected = answer.headers.get("Content-Length")
            print(f"{url}  {megabytes(int(expected)) if expected else 'of unknown size'}", flush=True)
            with whole(path) as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                if expected and file.tell() != int(expected):
                    raise HTTPException(f"ended after {megabytes(file.tell())}")
    except (OSError, ValueError, HTTPException, CheckpointError) as e:
        raise CheckpointError(f"cannot fetch {url}: {getattr(e, 'reason', None) or e or type(e).__name__}") from e
    return path


def load(
    run: str | Path = "latest",
    checkpoint: str | None = None,
    device: str = "cpu",
    log_dir: str = "logs",
) -> LightningModule:
    """The trained model of a run, in evaluation mode.

    Args:
        run: `latest`, a run folder, part of its name, a checkpoint file, or the http address of one.
        checkpoint: `best` or `last`; None takes the best where the run has chosen one.
        device: where the model is put, as torch names devices.
        log_dir: where runs are looked for.

    Returns:
        The LightningModule; a shipped classifier, called on normalized images [B, C, H, W], gives logits
        [B, num_classes].

    Raises:
        UserError: no such run, no checkpoint, or a damaged one.
    """
    content = read(which_file(run, checkpoint, log_dir), map_location=device)
    return restore(content).to(device)


def fitted(content: dict[str, Any]) -> dict[str, Any]:
    """What the data module of a run has fitted on its training samples; of an old checkpoint, the class names alone."""
    data = (content.get("config") or {}).get("data") or {}
    states = (part["fitted"] for part in content.values() if isinstance(part, dict) and "fitted" in part)
    found = next((state for state in states if isinstance(state, dict)), {})
    return copy.deepcopy({"class_names": data.get("class_names"), **found})  # the file may be mapped into memory


def restore(content: dict[str, Any]) -> LightningModule:
    """Builds the module that a checkpoint's own config describes and gives it the checkpoint's weights, as Lightning's
    `load_from_checkpoint` does: a module that builds layers in `configure_model`, or changes the content in
    `on_load_checkpoint`, is asked to."""
    config = content.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError("the checkpoint carries no config of a model: it was not written by boltlab")
    kinds = (nn.Module, Optimizer, Schedule, LRScheduler)
    refuse_untrusted({"model": config["model"]}, "the checkpoint's config", kinds)
    kind = locate(config["model"].get("_target_"))
    ours = inspect.isclass(kind) and issubclass(kind, Task)
    own = {"compile": False} if ours else {}
    model: LightningModule = build({"model": {**config["model"], **own}}, "model")
    # A compiled net's names, unless this one is compiled as well.
    weights = {key.replace("_orig_mod.", ""): value for key, value in content["state_dict"].items()}
    if ours:  # what the metrics have counted belongs to the training run: a model to use starts from zero
        weights = {key: value for key, value in weights.items() if "_metrics." not in key}
    else:
        model.configure_model()
        if any("_orig_mod." in key for key in model.state_dict()):
            weights = dict(content["state_dict"])
        content = {**content, "state_dict": weights}
        model.on_load_checkpoint(content)
        weights = content["state_dict"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [key for key in (*missing, *unexpected) if not (ours and "_metrics." in key)]
    if wrong and model.strict_loading:
        raise CheckpointError(f"the checkpoint does not fit the code of its model any more: {', '.join(wrong[:5])}")
    return model.eval()
