"""What the server imports that forks the processes of a run and the jobs of a launcher: all that a training needs.

Nothing here may touch a device: a forked process cannot use one that its parent has. The server ends when the command
that started it does, and is not to end before: what tells a whole group of processes to stop is for the others. A
signal that comes to one of them before it can act on it waits.
"""

import atexit
import importlib
import os
import sys
from contextlib import suppress
from multiprocessing import forkserver

from boltlab.ground.signals import hold_back

# The server itself need not take apart what it has imported; what is registered first is called last.
if getattr(sys.modules["__main__"], "main", None) is forkserver.main:
    atexit.register(os._exit, 0)

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else asking whether there is a GPU takes it
hold_back()

from boltlab import runs  # noqa: E402  # a signal may come from here on
from boltlab.config.validate import imports  # noqa: E402

_MODULES = (
    *("commands.train", "processes.several", "training.trainer", "training.load", "training.resume", "config.trust"),
    *("training.init_from",),
    *("metrics.means", "optim.build", "data.images", "data.augment", "data.tabular"),
    *("callbacks.last", "callbacks.throughput", "loggers.csv", "data.fingerprint"),
)
_LATER = (  # what these import when used
    *("hydra.utils", "hydra.core.override_parser.overrides_parser", "antlr4.LL1Analyzer", "filelock"),
    *("torch.utils.serialization.config", "fsspec.implementations.chained", "rich._emoji_codes"),
    *("importlib.resources.readers", "sklearn.datasets.data", "sklearn.datasets.descr"),
    *("torchmetrics.classification", "boltlab.callbacks.progress"),
)
with imports():
    for _name in _MODULES:
        importlib.import_module(f"boltlab.{_name}")
    for _name in _LATER:
        with suppress(ImportError):  # another version of a library may have it elsewhere: the child finds it
            importlib.import_module(_name)
runs.packages()
