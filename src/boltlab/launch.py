"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.check import process_count
from boltlab.errors import UserError


def launch(entry: Callable[[str], Any], folder: Path, config: DictConfig) -> None:
    """Runs `entry(folder)` in as many processes as the config asks for; `entry` stands at the top of a module.

    Raises:
        UserError: several nodes are asked for.
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a process failed; the others were ended.
    """
    processes = process_count(config)
    nodes = int(config.trainer.get("num_nodes", 1))
    if nodes > 1:
        raise UserError(f"trainer.num_nodes={nodes}: one command starts the processes of one machine only")
    if processes == 1:
        entry(str(folder))
        return
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0"
    )
    elastic_launch(settings, entry)(str(folder))
