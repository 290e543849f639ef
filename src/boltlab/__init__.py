"""boltlab: a PyTorch Lightning experiment template.

`boltlab.load(run)` gives the trained model of a run; everything else is a verb of the `boltlab` command.
"""

from typing import Any

__version__ = "0.1.0"


def load(run: Any = "latest", checkpoint: Any = None, device: str = "cpu", log_dir: str = "logs") -> Any:
    """The trained model of a run, in evaluation mode: see `boltlab.training.load.load`."""
    from boltlab.training.load import load  # torch is imported when a model is asked for, not for `boltlab --help`

    return load(run, checkpoint, device, log_dir)
