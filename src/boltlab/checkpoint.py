"""Writing, verifying and reading checkpoints.

A checkpoint holds tensors and plain Python values only, so it always loads with `weights_only=True`. It is written
beside its target, synced to the disk and renamed, so that a reader sees the old file or the new one, never a part.
A checkpoint is a zip archive; the archive's comment carries the SHA-256 of all that stands before it, so that one file
proves itself (`unzip -z last.ckpt` shows it, and torch.load and every unzip read it as before).
"""

import hashlib
import io
import os
import pickle
import secrets
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from boltlab import config as configs
from boltlab import runs
from boltlab.errors import UserError
from boltlab.models.schedulers import Schedule
from boltlab.trust import refuse_untrusted

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64


class CheckpointError(UserError):
    """A checkpoint is missing, broken or not what it should be; the message names the file."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin: plain content, whole files, a hash in each.

    Args:
        config: the resolved config as plain values; it travels in every checkpoint.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint; an error leaves what stood at `path` as it was."""
        write({**checkpoint, "config": self.config}, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint that passes its hash; anything but tensors and plain values is refused."""
        return read(Path(path), map_location=map_location or "cpu")


def write(content: dict[str, Any], path: Path) -> None:
    """Writes plain content beside `path`, adds its hash, syncs it to the disk and renames it."""
    buffer = io.BytesIO()
    torch.save(plain(content), buffer)
    comment = _MARK + hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)  # the last two bytes of a zip archive are the length of its comment
    buffer.write(struct.pack("<H", len(comment)) + comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the checkpoint {path}: {e.strerror}; what stood there is untouched") from e
    if os.name == "posix":  # the rename itself is on the disk only when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint that this module wrote.

    Raises:
        CheckpointError: no such file, cut short, changed, or holding more than tensors and plain values.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"cannot read the checkpoint {path}: {e.strerror}") from e
    problem = _hash_problem(raw)
    if problem:
        raise CheckpointError(f"the checkpoint {path} {problem}")
    try:
        content = torch.load(io.BytesIO(raw), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"the checkpoint {path} holds more than tensors and plain values: refused") from e
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"the checkpoint {path} holds no state_dict")
    return content


def verify(path: Path) -> str | None:
    """Says what is wrong with a checkpoint file; None where its content and its hash agree. Runs nothing from it."""
    try:
        return _hash_problem(path.read_bytes())
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _hash_problem(raw: bytes) -> str | None:
    if not raw:
        return "is empty"
    body, comment = raw[: -_COMMENT_BYTES - 2], raw[-_COMMENT_BYTES:]
    if not raw.startswith(b"PK") or not comment.startswith(_MARK):
        return "is cut short, or was not written by boltlab: it carries no hash"
    hashed = hashlib.sha256(body)
    hashed.update(b"\0\0")
    if hashed.hexdigest().encode() != comment[len(_MARK) :]:
        return "is damaged: its content does not fit its hash"
    return None


def plain(value: Any) -> Any:
    """The value with numpy scalars, paths and subclasses of containers made plain.

    Raises:
        CheckpointError: something in it is no tensor and no plain value; the message says where.
    """
    return _plain(value, "checkpoint")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str, bytes, complex):
        return value
    if isinstance(value, dict):
        return {_plain(k, where): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(v, f"{where}.{i}") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, set):
        return {_plain(v, where) for v in value}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Path):
        return str(value)
    for kind in (bool, int, float, str):  # an IntEnum, a str subclass
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return value
    raise CheckpointError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def find(folder: Path, which: str = "best") -> Path:
    """The checkpoint of a run: `best`, or `last` where no best was chosen yet.

    Raises:
        CheckpointError: the run has none. Random weights are never used in its place.
    """
    for name in dict.fromkeys((which, "last")):
        path = folder / "checkpoints" / f"{name}.ckpt"
        if path.is_file():
            return path
    raise CheckpointError(f"the run {folder} has no checkpoint: was it stopped before its first epoch ended?")


def load(
    run: str | Path = "latest", checkpoint: str = "best", device: str = "cpu", log_dir: str = "logs"
) -> LightningModule:
    """The trained model of a run, in evaluation mode.

    Args:
        run: `latest`, a run folder, part of its name, or a checkpoint file.
        checkpoint: `best` or `last`.
        device: where the model is put, as torch names devices.
        log_dir: where runs are looked for.

    Returns:
        The LightningModule; called on normalized images [B, C, H, W] it gives logits [B, num_classes].

    Raises:
        UserError: no such run, no checkpoint, or a damaged one.
    """
    path = Path(run)
    if path.suffix != ".ckpt":
        path = find(runs.find(str(run), log_dir), checkpoint)
    content = read(path, map_location=device)
    return restore(content).to(device)


def restore(content: dict[str, Any]) -> LightningModule:
    """Builds the model that a checkpoint's own config describes and gives it the checkpoint's weights."""
    config = content.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError("the checkpoint carries no config of a model: it was not written by boltlab")
    refuse_untrusted({"model": config["model"]}, "the checkpoint's config", (nn.Module, Optimizer, Schedule))
    model: LightningModule = configs.build({"model": {**config["model"], "compile": False}}, "model")
    # What the metrics have counted belongs to the training run: a model to use starts from zero.
    weights = {key: value for key, value in content["state_dict"].items() if "_metrics." not in key}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [key for key in (*missing, *unexpected) if "_metrics." not in key]
    if wrong:
        raise CheckpointError(f"the checkpoint does not fit the code of its model any more: {', '.join(wrong[:5])}")
    return model.eval()
