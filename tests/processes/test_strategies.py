"""What each strategy makes of the same run, held against one process; and what it cannot be combined with.

The ranks are started once and train all of the runs, one after another: their start costs more than the training.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from waiting import HANG

import boltlab as package
from boltlab import runs
from boltlab.config.compose import compose
from boltlab.training.fit import fit
from boltlab.training.start import name_of

pytestmark = [pytest.mark.floats, pytest.mark.slow]

QUICK = ("logger=none", "callbacks=[best,last]", "trainer.accelerator=cpu", "trainer.max_epochs=2", "precision=32")
QUICK += ("trainer.enable_progress_bar=false", "data.batch_size=128")
VIT = ("model=vit_tiny", "model.net.depth=2", "model.net.width=32", "model.net.heads=2", "optimizer.lr=0.003")
# AdamW as it is would make whole steps of gradients that are nothing but rounding, which each kernel does otherwise.
VIT += ("trainer.gradient_clip_val=0.5", "model.l1=0.0001", "scheduler=constant", "+optimizer.eps=0.01")
SHARDED = ("trainer=fsdp", "trainer.devices=2", "trainer.strategy.min_num_params=1000")
RUNS = {
    "fsdp": (*VIT, *SHARDED),
    "tensor": (*VIT, *SHARDED, "trainer.strategy.tensor_parallel_size=2"),
    "compressed": (*VIT, "trainer=ddp_compressed", "trainer.devices=2"),
    "norms": ("model=lenet_bn", *SHARDED),
    "continued": (*VIT, *SHARDED),
}
SCRIPT = """
import sys, torch
from pathlib import Path
from boltlab.runs import load_config
from boltlab.training.fit import fit
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    fit(folder, load_config(Path(folder), own=True))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The finished folder of each run, and of one process."""
    root = tmp_path_factory.mktemp("strategies")
    folders = {}
    for name, overrides in {"half": (*VIT, "trainer.max_epochs=1"), "one": VIT, **RUNS}.items():
        composed = compose("train", [*QUICK, *overrides, f"log_dir={root}", f"name={name}"])
        folders[name] = runs.new_folder(composed.config.log_dir, "train", name)
        runs.prepare(folders[name], composed.config, composed.overrides)
        runs.write_summary(folders[name], name=name_of(composed))
    for name in ("half", "one"):
        fit(str(folders[name]), runs.load_config(folders[name]))
    shutil.copytree(folders["half"] / "checkpoints", folders["continued"] / "checkpoints")
    (root / "script.py").write_text(SCRIPT, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(root / "script.py"), *(str(folders[name]) for name in RUNS)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    return folders


def content(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def distance(a, b):
    """The largest difference of two checkpoints' weights."""
    a, b = content(a)["state_dict"], content(b)["state_dict"]
    names = [name for name in a if name.startswith("net.")]
    assert list(a) == list(b) and all(a[name].shape == b[name].shape for name in names)
    return max(float((a[name] - b[name]).abs().max()) for name in names)


@pytest.mark.parametrize("name", ["fsdp", "tensor", "continued"])
def test_a_spread_run_is_that_of_one_process_to_rounding(trained, name):
    """With clipping, L1, and weight decay for some parameters only; also where one process trained its first half."""
    one, spread = content(trained["one"]), content(trained[name])
    assert distance(trained["one"], trained[name]) < 1e-5
    for number, state in one["optimizer_states"][0]["state"].items():  # whole, under the same numbers
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(spread["optimizer_states"][0]["state"][number][key], state[key])
    before, after = (runs.read_summary(trained[n]) for n in ("one", name))
    assert after["test"] == pytest.approx(before["test"], abs=1e-5)
    del before["final"]["train_loss_step"], after["final"]["train_loss_step"]  # of one batch
    assert after["final"] == pytest.approx(before["final"], abs=1e-4)


def test_compressed_gradients_are_rounded(trained):
    assert 1e-5 < distance(trained["one"], trained["compressed"]) < 1e-3


@pytest.mark.parametrize("name", ["fsdp", "tensor", "norms"])
def test_one_process_evaluates_and_loads_what_several_have_saved(trained, name, boltlab):
    """What stands in the summary was measured by two processes in training and test; a batch norm's statistics are
    those of rank 0 in both, and in the file."""
    summary = runs.read_summary(trained[name])
    for split, which, expected in (("test", "best", summary["test"]), ("val", "last", summary["final"])):
        code, _, err = boltlab("eval", f"run={trained[name]}", f"split={split}", f"checkpoint={which}", "log_dir=logs")
        assert code == 0, err
        measured = runs.read_summary(next(runs.folders("logs", "eval")))["test"]
        assert measured == pytest.approx({k: v for k, v in expected.items() if k in measured}, abs=1e-5)
    assert package.load(trained[name])(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_one_process_goes_on_with_a_sharded_run(trained, boltlab):
    more = ("trainer=cpu", "trainer.max_epochs=3", "trainer.gradient_clip_val=0.5", "trainer.enable_progress_bar=false")
    log_dir = f"log_dir={trained['fsdp'].parents[1]}"
    code, _, err = boltlab("train", f"resume={trained['fsdp'].name}", log_dir, *more)
    assert code == 1 and "resume_changed=restart_epoch" in err
    code, out, err = boltlab("train", f"resume={trained['fsdp'].name}", log_dir, *more, "resume_changed=restart_epoch")
    assert code == 0, err
    assert "resumes from last.ckpt" in out and runs.read_summary(trained["fsdp"])["epochs"] == 3


@pytest.fixture
def mesh():
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.distributed.destroy_process_group()


def test_blocks_are_gathered_one_by_one(mesh):
    from types import SimpleNamespace

    from torch.distributed.tensor import DTensor

    from boltlab.strategies.fsdp import FSDP, units
    from project.models.vit import ViT

    net = ViT((1, 28, 28), 10, width=32, depth=4, heads=2)
    block, whole = (sum(p.numel() for p in module.parameters()) for module in (net.blocks[0], net))
    assert [name for name, _ in units(net, block)] == [f"blocks.{i}" for i in range(4)]
    assert list(units(net, block + 1)) == []
    gathered = []
    for module in net.modules():
        module.register_forward_hook(
            lambda *_: gathered.append(sum(p.numel() for p in net.parameters() if not isinstance(p, DTensor)))
        )
    known = {"device_mesh": mesh, "min_num_params": block, "tensor_parallel_size": 1}
    strategy = SimpleNamespace(**known, _is_spread=False, _layer_sync=None)
    strategy._refuse = lambda *_: None
    FSDP.spread(strategy, SimpleNamespace(), [net])
    net(torch.zeros(2, 1, 28, 28))
    assert block < max(gathered) <= whole - 3 * block  # stem and head, and one of four


@pytest.mark.parametrize(
    ("overrides", "key", "cure"),
    [
        ("trainer=fsdp precision=16-mixed", "precision=16-mixed", "bf16-mixed"),
        (
            "trainer=fsdp trainer.strategy.tensor_parallel_size=3",
            "tensor_parallel_size=3",
            "does not divide 2 processes",
        ),
        ("trainer=fsdp trainer.strategy.tensor_parallel_size=2", "tensor_parallel_size=2", "LeNet has no tensor_par"),
        ("trainer=ddp_compressed trainer.accumulate_grad_batches=2", "accumulate_grad_batches=2", "static_graph=false"),
        ("trainer=fsdp +trainer.strategy.save_distributed_checkpoint=true", "save_distributed", "takes no argument"),
        ("trainer=deepspeed", "trainer.strategy.stage=2", "pip install 'boltlab[deepspeed]'"),
    ],
)
def test_what_cannot_be_combined_is_named_beforehand(overrides, key, cure, boltlab, monkeypatch):
    monkeypatch.setattr("boltlab.strategies.deepspeed.find_spec", lambda _: None)
    code, _, err = boltlab("train", *overrides.split(), "trainer.accelerator=cpu", "trainer.devices=2")
    assert code == 2 and key in err and cure in err


def test_the_processes_of_a_tensor_parallel_group_share_a_batch():
    overrides = ("model=vit_tiny", *SHARDED, "trainer.strategy.tensor_parallel_size=2", "data.batch_size=63")
    assert compose("train", [*overrides, "trainer.accelerator=cpu"]).config.data.batch_size == 63
