"""`sweep.engine=wandb`: the W&B server chooses, W&B's own agents start `boltlab train`, from the same YAML.

What the server cannot do is refused: its samplers are bayes, random and grid, it knows no conditions, and it prunes by
its own Hyperband. The trainings are what the agents' command says, so any machine with this clone can join.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from boltlab.check import ConfigError, Mistake
from boltlab.errors import UserError
from boltlab.sweeps.space import Dimension

METHODS = {"TPESampler": "bayes", "GPSampler": "bayes", "RandomSampler": "random", "BruteForceSampler": "grid"}
PRUNERS = {"NopPruner": None, "HyperbandPruner": "hyperband"}


def refuse(
    asked: Mapping[str, Any], space: Sequence[Dimension], storage: str | None, launcher: Any, minutes: Any = None
) -> None:
    """
    Raises:
        ConfigError: with all that the W&B server has no counterpart for.
    """
    mistakes = [
        Mistake(f"sweep.space.{d.key}", "has a condition (when), which W&B's sweeps do not know")
        for d in space
        if d.when is not None
    ]
    mistakes += [
        Mistake(f"sweep.space.{d.key}", "is a whole number by its logarithm, which W&B draws as 96.0: give a choice")
        for d in space
        if d.values.log and d.values.whole
    ]
    for key, known in (("sampler", METHODS), ("pruner", PRUNERS)):
        name = asked[key]["_target_"].rpartition(".")[2]
        if name not in known:
            words = {"sampler": "tpe, random or grid", "pruner": "hyperband or none"}[key]
            mistakes.append(Mistake(key, f"W&B's sweeps have nothing like {name}: {key}={words}"))
    if len(asked["objectives"]) > 1:
        mistakes.append(Mistake("sweep.objectives", "W&B's sweeps have one"))
    if len(asked["parts"]) > 1:
        mistakes.append(Mistake("seeds and folds", "are trials of their own for W&B: make seed a key of the space"))
    if storage is not None:
        mistakes.append(Mistake("storage", "is the W&B server's with sweep.engine=wandb"))
    if minutes is not None:
        mistakes.append(Mistake("sweep.timeout_minutes", "W&B's sweeps have no time limit: give sweep.trials"))
    if launcher is not None:
        mistakes.append(Mistake("launcher", "starts no W&B agents: start `wandb agent` in your own job file"))
    if mistakes:
        raise ConfigError(mistakes)


def sweep_config(asked: Mapping[str, Any], space: Sequence[Dimension], trials: int | None) -> dict[str, Any]:
    """The sweep as W&B's server takes it; its command is `boltlab train`, with the values as overrides."""
    ((metric, mode),) = asked["objectives"].items()
    found: dict[str, Any] = {
        "name": asked["name"],
        "method": METHODS[asked["sampler"]["_target_"].rpartition(".")[2]],
        # the summary of a run holds the best value, by its logger
        "metric": {"name": metric, "goal": {"max": "maximize", "min": "minimize"}[mode]},
        "parameters": {d.key: _parameter(d) for d in space},
        "command": [sys.executable, "-m", "boltlab", "train", *asked["train"], "${args_no_hyphens}"],
    }
    if trials:
        found["run_cap"] = trials
    if asked["pruner"]["_target_"].endswith("HyperbandPruner"):
        keys = {"min_resource": "min_iter", "reduction_factor": "eta"}
        found["early_terminate"] = {"type": "hyperband"} | {
            theirs: asked["pruner"][ours] for ours, theirs in keys.items() if isinstance(asked["pruner"].get(ours), int)
        }
    return found


def _parameter(d: Dimension) -> dict[str, Any]:
    v = d.values
    if v.texts:
        return {"values": list(v.texts)}
    if v.step is not None:  # W&B's own steps are floats: 96.0 for 96
        return {"values": [v.low + i * v.step for i in range(int(d.size()))]}
    kind = "log_uniform_values" if v.log else "int_uniform" if v.whole else "uniform"
    return {"distribution": kind, "min": v.low, "max": v.high}


def run(sweep: Mapping[str, Any], config: DictConfig, workers: int) -> int:
    """Creates the sweep on the server, and serves it with so many agents of this machine until it is done.

    Raises:
        UserError: W&B is not set up here, or refuses.
    """
    import wandb

    logger = (config.logger or {}).get("wandb")
    if logger is None:
        raise UserError("sweep.engine=wandb: the trainings log to W&B: logger=wandb")
    try:
        if not wandb.login(prompt=False, verify=False):
            raise UserError("sweep.engine=wandb needs the W&B server: `wandb login` saves an API key")
        name = wandb.sweep(dict(sweep), entity=logger.entity, project=logger.project)
    except (wandb.Error, OSError) as e:
        raise UserError(f"sweep.engine=wandb: {str(e).splitlines()[0]}") from None
    path = "/".join(filter(None, (logger.entity, logger.project, name)))
    command = [sys.executable, "-m", "wandb", "agent", path]
    print(f"on any machine with this clone: wandb agent {path}", flush=True)
    agents = [subprocess.Popen(command) for _ in range(workers)]
    try:
        return max(agent.wait() for agent in agents)
    finally:
        for agent in agents:
            agent.terminate()
