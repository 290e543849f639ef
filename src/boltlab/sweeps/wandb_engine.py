"""`sweep.engine=wandb`: the W&B server chooses, W&B's own agents start `boltlab train`, from the same YAML.

What the server cannot do is refused: its samplers are bayes, random and grid, it knows no conditions, and it prunes by
its own Hyperband. The trainings are what the agents' command says, so any machine with this clone can join.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from boltlab import runs
from boltlab.ground import signals
from boltlab.ground.errors import ConfigError, Mistake, UserError
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
    others = {
        "sweep.objectives": (len(asked["objectives"]) > 1, "W&B's sweeps have one"),
        "seeds and folds": (len(asked["parts"]) > 1, "are trials of their own for W&B: make seed a key of the space"),
        "storage": (storage is not None, "is the W&B server's with sweep.engine=wandb"),
        "sweep.timeout_minutes": (minutes is not None, "W&B's sweeps have no time limit: give sweep.trials"),
        "launcher": (launcher is not None, "starts no W&B agents: start `wandb agent` in your own job file"),
    }
    mistakes += [Mistake(where, what) for where, (broken, what) in others.items() if broken]
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
        UserError: W&B is not set up here, or refuses; or none of the trainings came to its end.
        Stopped: this command was told to stop; the trainings at work have saved, and the agents have ended.
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
    # An agent that is told to stop leaves its training alone, if it is not to forward signals.
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", path]
    print(f"on any machine with this clone: wandb agent {path}", flush=True)
    agents: list[subprocess.Popen[bytes]] = []

    def stop(signum: int) -> None:
        for agent in agents if signum != signals.SAVING else ():
            agent.terminate()  # by any other signal, an agent would go on with the next training

    before = set(runs.folders(config.log_dir))
    with signals.passed_on(stop):
        # Sessions of their own: a terminal's Ctrl-C comes to them once, from here.
        apart: Any = {"start_new_session": True, "preexec_fn": None}
        if sys.platform == "linux":
            apart["preexec_fn"] = signals.stop_with_parent
        agents.extend(subprocess.Popen(command, **apart) for _ in range(workers))
        if signals.inbox.stop:  # while they were started
            stop(signals.inbox.stop)
        codes = [agent.wait() for agent in agents]
    code = max(code if code >= 0 else 128 - code for code in codes)
    ended = set(runs.folders(config.log_dir)) - before
    if code == 0 and not any(runs.read_summary(folder).get("status") == "finished" for folder in ended):
        raise UserError("sweep.engine=wandb: no training of these agents came to its end")
    return code
