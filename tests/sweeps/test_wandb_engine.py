"""What is given to the W&B server, and what its agents would start; the server itself is not to be had in a test."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from omegaconf import OmegaConf
from waiting import until

from boltlab.config.compose import compose
from boltlab.ground.errors import ConfigError, UserError
from boltlab.ground.signals import Stopped
from boltlab.sweeps import space as spaces
from boltlab.sweeps import wandb_engine

ASKED = {
    "name": "s",
    "train": ["data=digits", "model=mlp", "test=false"],
    "objectives": {"val_acc": "max"},
    "sampler": {"_target_": "optuna.samplers.TPESampler"},
    "pruner": {"_target_": "optuna.pruners.HyperbandPruner", "min_resource": 2, "max_resource": "auto"},
    "parts": [["", []]],
}
SPACE = {
    "optimizer": "choice(sgd,adamw)",
    "optimizer.lr": "tag(log,interval(1e-4,1e-1))",
    "optimizer.weight_decay": "interval(0.0,0.1)",
    "model.net.hidden_sizes.0": "range(32,128,32)",
    "trainer.accumulate_grad_batches": "int(interval(1,4))",
}


def test_the_space_is_that_of_a_w_and_b_sweep():
    config = wandb_engine.sweep_config(ASKED, spaces.parse(SPACE), trials=12)
    assert (config["method"], config["run_cap"]) == ("bayes", 12)
    assert config["metric"] == {"name": "val_acc", "goal": "maximize"}
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 2}
    assert config["parameters"] == {
        "optimizer": {"values": ["sgd", "adamw"]},
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        "optimizer.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.1},
        "model.net.hidden_sizes.0": {"values": [32, 64, 96]},
        "trainer.accumulate_grad_batches": {"distribution": "int_uniform", "min": 1, "max": 4},
    }


@pytest.mark.slow
def test_what_an_agent_would_start_is_a_training_with_these_values():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = wandb_engine.sweep_config(ASKED, spaces.parse(SPACE), trials=None)
    drawn = {"optimizer": "sgd", "optimizer.lr": 0.25, "model.net.hidden_sizes.0": 96}
    given = create_sweep_command_args({"args": {key: {"value": value} for key, value in drawn.items()}})
    words = []
    for word in create_sweep_command(config["command"]):
        words += given["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert words[1:4] == ["-m", "boltlab", "train"]
    composed = compose("train", words[4:]).config
    assert composed.optimizer._target_.endswith("SGD") and composed.optimizer.lr == 0.25
    assert composed.model.net.hidden_sizes[0] == 96


def test_what_the_server_does_not_know_is_refused_all_at_once(boltlab):
    more = ("sampler=cmaes", "pruner=median", "seeds=2", "storage=journal")
    code, _, err = boltlab("sweep", "sweep=digits", "sweep.engine=wandb", *more)
    assert code == 2
    for named in ("optimizer.momentum", "nothing like CmaEsSampler", "nothing like MedianPruner", "seeds", "storage"):
        assert named in err, named
    conditional = spaces.parse({"a": "x,y", "b": {"values": "1,2", "when": "a=x"}})
    with pytest.raises(ConfigError, match="has a condition"):
        wandb_engine.refuse(ASKED, conditional, None, None)


def test_without_a_key_a_line_says_what_is_missing(boltlab, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setenv("WANDB_MODE", "online")
    space = ("optimizer.lr=interval(0.1,0.2)", "pruner=none", "sweep.engine=wandb")
    code, _, err = boltlab("sweep", *space)
    assert code == 1 and "wandb login" in err, err


@pytest.fixture
def agents(tmp_path, monkeypatch):
    """Makes a sweep whose agents are this script of the shell, and serves it by two of them: the exit code."""

    def run(script):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(python))
        monkeypatch.setattr("wandb.login", lambda **_: True)
        monkeypatch.setattr("wandb.sweep", lambda *_, **__: "abc")
        config = OmegaConf.create({"logger": {"wandb": {"entity": None, "project": "p"}}, "log_dir": "logs"})
        return wandb_engine.run({}, config, 2)

    return run


def test_a_sweep_ends_with_its_agents_and_fails_with_them(agents):
    with pytest.raises(UserError, match="no training of these agents came to its end"):
        agents("exit 0")  # as an agent does whose trainings all fail
    folder = "logs/train/$$"
    trained = (
        f'mkdir -p {folder}; touch {folder}/config.yaml; echo \'{{"status": "finished"}}\' > {folder}/summary.json'
    )
    assert agents(trained) == 0
    assert agents(f"{trained}; mkdir ../killed && kill -9 $$; exit 0") == 137


# W&B's own agent, which is given one training.
SERVED = """
import sys, wandb
from wandb import wandb_agent
from wandb.apis.public import sweeps
from wandb.cli.cli import cli

given = iter([[{"type": "run", "run_id": "r", "program": "", "args": {}}]])
sweeps._sweep_with_runs = lambda *_: {"config": "command: [sh, training]"}
sweeps._register_agent = lambda *_, **__: {"id": "a"}
sweeps._agent_heartbeat = lambda *_: next(given, [])
wandb_agent.Agent.POLL_INTERVAL = 0.05
wandb_agent.wandb_login._login = lambda **_: True
wandb.Api = lambda: None
cli(sys.argv[3:])
"""
SWEEP = """
import sys, wandb
from omegaconf import OmegaConf
from boltlab.sweeps import wandb_engine

sys.executable = "./python"
wandb.login, wandb.sweep = lambda **_: True, lambda *_, **__: "abc"
wandb_engine.run({}, OmegaConf.create({"logger": {"wandb": {"entity": None, "project": "p"}}, "log_dir": "logs"}), 2)
"""
TRAINING = """
trap 'touch saved-$$; exit 143' TERM
touch begun-$$
for i in $(seq 72000); do sleep 0.05; done
"""


def at_work(folder, kind):
    """Two trainings, once they have said so."""
    until(lambda: len(list(folder.glob(f"{kind}-*"))) >= 2)
    return {path.name.partition("-")[2] for path in folder.glob(f"{kind}-*")}


def test_a_sweep_that_is_told_to_stop_has_its_trainings_save(agents, tmp_path):
    (tmp_path / "training").write_text(TRAINING)
    (tmp_path / "served.py").write_text(SERVED)

    def stop():
        at_work(tmp_path, "begun")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped):
        agents(f'exec {sys.executable} served.py "$@"')
    begun = at_work(tmp_path, "begun")
    assert len(begun) == 2 and begun == at_work(tmp_path, "saved")


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process that its parent has died")
def test_the_trainings_of_a_sweep_that_is_killed_save(tmp_path):
    (tmp_path / "training").write_text(TRAINING)
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} served.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "sweep.py").write_text(SWEEP)
    with subprocess.Popen([sys.executable, "sweep.py"], cwd=tmp_path) as sweep:
        begun = at_work(tmp_path, "begun")
        sweep.kill()
    assert len(begun) == 2 and begun == at_work(tmp_path, "saved")
