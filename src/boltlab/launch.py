"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.check import process_count
from boltlab.errors import UserError


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
    try:
        entry(folder)
    except UserError as e:
        message = Path(folder) / f".error-{os.environ['RANK']}"
        message.write_text(str(e), encoding="utf-8")
        message.replace(Path(folder) / ".error")
        raise SystemExit(1) from None
