"""Who started this process, told by its environment: a person, torchrun, srun, or a launcher of ours."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boltlab.ground.errors import UserError

leader: Any = None  # in rank 0 of processes from outside, which follow it: the `Leader` of `processes.rendezvous`
parent = 0  # in the process of a launcher's job on this machine: the process that has started it


@dataclass(frozen=True)
class World:
    """The processes that a launcher outside has started, seen from one of them."""

    launcher: str
    rank: int
    size: int
    local_size: int

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def outside() -> World | None:
    """The processes that torchrun or srun has started; None where this process is alone.

    Raises:
        ConfigError: the variables that say so are there in part.
        UserError: the nodes have different numbers of processes.
    """
    v = os.environ
    if "RANK" in v and "TORCHELASTIC_RUN_ID" not in v:
        from boltlab.ground import ranks

        ranks.refuse_a_part(v)
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= v.keys():
        size = int(v["WORLD_SIZE"])
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in v else "srun" if "SLURM_STEP_ID" in v else "a launcher"
        world = World(launcher, int(v["RANK"]), size, int(v.get("LOCAL_WORLD_SIZE", size)))
    elif int(v.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in v:
        # One number for each node: 8(x2) stands for 8,8.
        per_node = {int(n) for n in re.findall(r"(\d+)(?:\(x\d+\))?", v.get("SLURM_STEP_TASKS_PER_NODE", "1"))}
        if len(per_node) > 1:
            raise UserError(f"srun has started {v['SLURM_STEP_TASKS_PER_NODE']} tasks: take --ntasks-per-node=…")
        world = World("srun", int(v["SLURM_PROCID"]), int(v["SLURM_STEP_NUM_TASKS"]), per_node.pop())
    else:
        return None
    if world.size == 1:
        return None
    if world.size % world.local_size:
        raise UserError(f"{world.launcher} has started {world.size} processes, not the same number on each node")
    return world


def start() -> tuple[str, int]:
    """What names this start of a command for its launcher, the same when it is started again; and how often that was.

    A job that Slurm puts back into its queue and processes that torchrun starts again resume the run that they had
    begun: this is how they find it. ("", 0) where nothing starts a command again.
    """
    v = os.environ
    name = ""
    if "TORCHELASTIC_RUN_ID" in v:
        # Its parent is the agent. The id alone may be the same for every run of a script.
        name = f"torchrun {v['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"
    if "SLURM_JOB_ID" in v:
        name = f"slurm {slurm_job()}" + (f".{v['SLURM_STEP_ID']}" if "SLURM_STEP_ID" in v else "")
    return name, int(v.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(v.get("SLURM_RESTART_COUNT", 0))


def slurm_job() -> str | None:
    """The job of Slurm that this process belongs to, as squeue names it."""
    v = os.environ
    if "SLURM_ARRAY_JOB_ID" in v:
        return f"{v['SLURM_ARRAY_JOB_ID']}_{v['SLURM_ARRAY_TASK_ID']}"
    return v.get("SLURM_JOB_ID")


# What a process knows of those that were started beside it, by torchrun and by srun.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
_OF_TASKS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP", "SLURM_TASK_PID", "SLURM_GTIDS")


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that is to know of no others."""
    return {name: value for name, value in environment.items() if not name.startswith((*OF_RANKS, *_OF_TASKS))}
