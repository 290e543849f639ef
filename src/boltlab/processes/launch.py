"""How a run gets its processes.

One process composes the config and makes the run folder. Every process of the run, also a single one, then reads the
config from that folder: none of them goes through Hydra's command line again. Several processes on one machine are
started by torch's elastic launcher, which ends all of them when one fails; those that torchrun or srun has started are
led by their rank 0 (see `boltlab.processes.rendezvous`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.config.devices import process_count
from boltlab.ground import started_by
from boltlab.ground.errors import UserError
from boltlab.ground.malloc import keep_freed_memory

Entry = Callable[[str, DictConfig], Any]  # what a process of a run does, with its folder and its config

_SEVERAL = re.compile(r"trainer=(ddp|fsdp|deepspeed)|trainer\.devices=(?!1$)|max_restarts=[1-9]")


def launch(entry: Entry, folder: Path, config: DictConfig) -> None:
    """Runs `entry(folder, config)` in as many processes as the config asks for; `entry` stands at the top of a module.

    config: what the folder's config.yaml holds, as it is read again.

    `max_restarts` of the config: how often the processes are started again after one of them has failed; `entry` then
    finds the folder as they have left it.

    Raises:
        UserError: several nodes are asked for, or a process raised one; the other processes were ended.
        ProcessFailed: a process failed in another way; it is named.
        Stopped: the processes were told to stop, and did.
    """
    processes, restarts = process_count(config), int(config.get("max_restarts", 0))
    keep_freed_memory()
    if started_by.leader is not None:
        started_by.leader.run(entry, folder, config)
        return
    nodes = int(config.trainer.get("num_nodes", 1))
    if nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: one command starts the processes of one machine only; start it on each node"
            " with torchrun (scripts/torchrun.sh), or with srun (scripts/slurm.sbatch)"
        )
    if processes == 1 and not restarts:
        entry(str(folder), config)
        return
    from boltlab.processes import several

    several.run(entry, folder, config, processes, restarts)


def expect(overrides: list[str]) -> None:
    """Where overrides seem to ask for several processes, starts beside the composing what they will be forked from."""
    asked = any(map(_SEVERAL.match, overrides)) and not any(text.startswith("launcher=") for text in overrides)
    if asked and started_by.outside() is None:
        from boltlab.processes import several

        several.ready()
