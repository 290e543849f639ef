"""What the server imports that forks the processes of a run and the jobs of a launcher: all that a training needs.

Nothing here may touch a device: a forked process cannot use one that its parent has. The server ends when the command
that started it does, and is not to end before: what tells a whole group of processes to stop is for the others.
"""

import importlib
import os
import signal

from boltlab.signals import SAVING, STOPPING

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking whether there is a GPU takes it
for _signum in (*STOPPING, SAVING):
    if _signum is not None:  # Windows lacks some
        signal.signal(_signum, signal.SIG_IGN)

_MODULES = (
    *("commands.train", "launch", "trainer", "checkpoint", "resume", "transfer", "trust"),
    *("models.classifier", "models.regressor", "data.images", "data.augment", "data.digits"),
    *("callbacks.last", "callbacks.progress", "callbacks.throughput"),
)
for _name in _MODULES:
    importlib.import_module(f"boltlab.{_name}")
