"""What Lightning reads and writes checkpoints with."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from boltlab.checkpoints.file import CheckpointError, plain, read, write


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
