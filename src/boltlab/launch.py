"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails.
"""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.check import process_count
from boltlab.errors import UserError


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    glibc gives large blocks back to the system at once, which clears every page of them when they are asked for again:
    a quarter of a convolutional net's training step on a CPU, and four fifths of a batch's normalization. What a user
    has set in the environment (MALLOC_…) is left as it is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):  # another C library, another system
        import ctypes

        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def launch(entry: Callable[[str], Any], folder: Path, config: DictConfig) -> None:
    """Runs `entry(folder)` in as many processes as the config asks for; `entry` stands at the top of a module.

    Raises:
        UserError: several nodes are asked for, or a process raised one; the other processes were ended.
        KeyboardInterrupt: Ctrl-C; all processes were ended.
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a process failed in another way.
    """
    processes = process_count(config)
    nodes = int(config.trainer.get("num_nodes", 1))
    if nodes > 1:
        raise UserError(f"trainer.num_nodes={nodes}: one command starts the processes of one machine only")
    keep_freed_memory()
    if processes == 1:
        entry(str(folder))
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8),
        max_restarts=0,  # what failed once is not silently trained again
    )
    message = folder / ".error"
    try:
        elastic_launch(settings, _rank)(entry, str(folder))
    except SignalException as e:
        raise KeyboardInterrupt from e
    except ChildFailedError:
        if message.exists():
            raise UserError(message.read_text(encoding="utf-8")) from None
        raise
    finally:
        message.unlink(missing_ok=True)


def _rank(entry: Callable[[str], Any], folder: str) -> None:
    """One process of several: the text of a UserError is left where the parent finds it."""
    keep_freed_memory()
    try:
        entry(folder)
    except UserError as e:
        message = Path(folder) / f".error-{os.environ['RANK']}"
        message.write_text(str(e), encoding="utf-8")
        message.replace(Path(folder) / ".error")
        raise SystemExit(1) from None
