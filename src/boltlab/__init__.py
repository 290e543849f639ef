"""boltlab: a PyTorch Lightning experiment template.

`boltlab.load(run)` gives the trained model of a run; everything else is a verb of the `boltlab` command. A project
imports the public names of `boltlab`, `.data`, `.metrics`, `.optim`, `.callbacks` and `.testing`: their `__all__`.
"""

from typing import Any

from boltlab.ground.errors import DataError, UserError

__version__ = "0.1.0"
__all__ = ["DataError", "UserError", "load"]


def load(run: Any = "latest", checkpoint: Any = None, device: str = "cpu", log_dir: str = "logs") -> Any:
    """The trained model of a run, in evaluation mode: see `boltlab.training.load.load`."""
    from boltlab.training.load import load  # torch is imported when a model is asked for, not for `boltlab --help`

    return load(run, checkpoint, device, log_dir)
