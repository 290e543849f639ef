"""What the server imports that forks the processes of a run and the jobs of a launcher: all that a training needs.

Nothing here may touch a device: a forked process cannot use one that its parent has. The server ends when the command
that started it does, and is not to end before: what tells a whole group of processes to stop is for the others. A
signal that comes to one of them before it can act on it waits.
"""

import importlib
import os

from boltlab.signals import hold_back

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking whether there is a GPU takes it
hold_back()

_MODULES = (
    *("commands.train", "launch", "trainer", "checkpoint", "resume", "transfer", "trust"),
    *("models.classifier", "models.regressor", "data.images", "data.augment", "data.digits"),
    *("callbacks.last", "callbacks.progress", "callbacks.throughput"),
)
for _name in _MODULES:
    importlib.import_module(f"boltlab.{_name}")
for _name in ("hydra.utils", "hydra.core.override_parser.overrides_parser", "filelock"):  # what these import when used
    importlib.import_module(_name)
