"""What a process knows of those that torchrun or srun has started beside it."""

import os
import socket
import threading
from pathlib import Path

import lightning.pytorch  # noqa: F401 - it keeps for good the rank that it finds when it is imported
import pytest
from omegaconf import OmegaConf
from torch.distributed import HashStore, PrefixStore
from waiting import HANG

from boltlab.config import devices
from boltlab.ground import started_by
from boltlab.ground.errors import UserError
from boltlab.ground.started_by import World
from boltlab.processes import rendezvous
from boltlab.processes.exits import led

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
SRUN = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[7-8]"}


@pytest.fixture
def variables(monkeypatch):
    for name in (*TORCHRUN, *SRUN, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def set_them(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_alone_is_the_command_that_nobody_started_several_times(variables):
    assert started_by.outside() is None and started_by.start() == ("", 0)
    variables({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # in a job script, before any srun
    assert started_by.outside() is None and started_by.start() == ("slurm 17", 0)


def test_torchrun_and_srun_are_known_by_their_variables(variables):
    variables(SRUN)
    assert started_by.outside() == World("srun", 3, 4, 2) and started_by.outside().nodes == 2
    assert started_by.start() == ("slurm 17.2", 0)
    variables({"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2"})
    assert started_by.start() == ("slurm 16_4.2", 2)
    variables(TORCHRUN)  # started by a task of srun
    assert started_by.outside() == World("torchrun", 5, 8, 4)


def test_a_restart_by_torchrun_has_the_name_of_its_agent(variables):
    variables(TORCHRUN)
    name = f"torchrun x {socket.gethostname()} {os.getppid()}"  # --rdzv-id may be the same for every run of a script
    assert started_by.start() == (name, 0)
    variables({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert started_by.start() == (name, 1)


def test_a_process_alone_knows_of_no_others(variables):
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "17", "TORCH_HOME": "/data"}
    assert started_by.alone(TORCHRUN | SRUN | kept | {"MASTER_PORT": "1"}) == kept


def test_nodes_with_different_numbers_of_processes_are_refused(variables, capsys):
    variables(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"})
    with pytest.raises(UserError, match="srun has started 2,1.x2. tasks: take --ntasks-per-node"):
        started_by.outside()
    assert led(lambda: 0) == 1
    assert "--ntasks-per-node" in capsys.readouterr().err


IN_PART = [
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "0"},
    {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
]


@pytest.mark.parametrize("given", IN_PART, ids=str)
def test_variables_that_name_others_in_part_are_refused(variables, boltlab, given):
    variables(given)
    code, _, err = boltlab("train", "data=digits")
    assert code == 2 and "RANK=" in err and "of the environment: " in err and not Path("logs").exists()
    missing = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - given.keys()
    assert all(name in err for name in missing)


def test_variables_of_slurm_become_those_of_torch(variables):
    variables(SRUN)
    rendezvous._as_torchrun(started_by.outside())
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["3", "1", "1", "4", "2", "node7"]
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000
    for name in (*names, "MASTER_PORT"):
        del os.environ[name]


def config(**trainer):
    return OmegaConf.create({"trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, **trainer}})


def test_the_processes_that_there_are_stand_in_the_config(variables):
    variables(TORCHRUN)
    found = config()
    assert devices.settle(found, ["optimizer.lr=1"]) == []
    assert (found.trainer.devices, found.trainer.num_nodes) == (4, 2)
    assert devices.settle(config(devices="4"), ["trainer.devices=4"]) == []
    assert devices.settle(config(devices=-1), ["trainer.devices=-1"]) == []
    (mistake,) = devices.settle(config(devices=8), ["trainer.devices=8"])
    assert mistake.where == "trainer.devices=8"
    assert mistake.message == "but torchrun has started 8 processes, 4 on each node: leave it out"


def test_one_visible_gpu_for_each_process_makes_it_a_node(variables, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    variables(SRUN)
    found = config(accelerator="gpu")
    assert devices.settle(found, []) == []
    assert (found.trainer.devices, found.trainer.num_nodes) == (1, 4)


@pytest.fixture
def store():
    return HashStore()


def test_rank_0_leads_and_the_others_run_what_it_tells_them(variables, store, tmp_path, monkeypatch):
    """Two ranks as two threads of this process, in a store in which an earlier start has left its words."""
    old = PrefixStore("old", store)
    old.set("order-0", '{"code": 9}')
    store.set("boltlab/part", "old")
    store.set("boltlab/run", str(tmp_path))
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(rendezvous, "follow", lambda function, folder: function(folder))
    codes = {}

    def other():
        codes[1] = rendezvous._obey(World("torchrun", 1, 2, 2), store)

    def command():
        assert started_by.leader.begun == tmp_path
        for number in (0, 1):
            started_by.leader.order(entry, tmp_path)
            (tmp_path / f"led-{number}").touch()
        return 3

    thread = threading.Thread(target=other)
    thread.start()
    codes[0] = rendezvous._lead(World("torchrun", 0, 2, 2), store, command)
    thread.join(HANG)
    assert codes == {0: 3, 1: 3}  # all end with the exit code of rank 0
    assert (tmp_path / "followed").read_text() == "entry" * 2
    assert started_by.leader is None


def entry(folder):
    with (folder / "followed").open("a") as file:
        file.write("entry")


def test_a_node_that_does_not_see_the_run_folder_is_named(store, tmp_path):
    thread = threading.Thread(target=lambda: rendezvous._obey(World("srun", 1, 2, 1), store))
    thread.start()
    leader = rendezvous.Leader(World("srun", 0, 2, 1), store, rendezvous._meet(World("srun", 0, 2, 1), store))
    with pytest.raises(UserError, match="rank 1 on .* does not see .*nowhere: log_dir must lie on a disk that all"):
        leader.order(entry, tmp_path / "nowhere")
    leader.end(1)
    thread.join(HANG)


def test_rank_0_that_is_gone_is_named(store):
    class Gone:
        def check(self, keys):
            from torch.distributed import DistNetworkError

            raise DistNetworkError("Connection reset by peer")

    with pytest.raises(UserError, match="rank 0 is gone"):
        rendezvous._wait(Gone(), "boltlab/0", "rank 0")
    with pytest.raises(UserError, match="rank 1 gave no answer within 0 s"):
        rendezvous._wait(store, "boltlab/0/1", "rank 1", seconds=0.01)


def test_after_a_failure_nothing_more_is_started(store, tmp_path):
    leader = rendezvous.Leader(World("torchrun", 0, 2, 2), store, store)
    leader.alone = True
    with pytest.raises(UserError, match="a process that torchrun has started is gone: start the command again"):
        leader.order(entry, tmp_path)
    assert not store.check(["order-0"])
