"""`trainer=fsdp` spreads the nets of a plain module, which knows nothing of it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from plain.conftest import KINDS
from torch import nn
from waiting import HANG

from boltlab.ground.errors import UserError
from boltlab.strategies.fsdp import FSDP


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "lit"])
def test_two_processes_train_what_they_train_with_ddp(cells, tmp_path, kind):
    data, model, monitor = KINDS[kind]
    given = (f"data=cells_{data}", f"model=cells_{model}", f"monitor={monitor}", "trusted=[cells]", "precision=32")
    short = ("logger=none", "test=false", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=2")
    weights = []
    for strategy in ("ddp", "fsdp"):
        command = ("train", *given, f"trainer={strategy}", *short, f"log_dir={tmp_path / strategy}")
        done = subprocess.run(
            [sys.executable, "-m", "boltlab", *command],
            cwd=cells,
            env={**os.environ, "PYTHONPATH": str(cells / "src")},
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = (tmp_path / strategy).glob("train/*/checkpoints/last.ckpt")
        weights.append(torch.load(path, weights_only=True)["state_dict"])
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)


def test_a_parameter_beside_the_nets_is_refused():
    """Nobody would take the mean of its gradients over the processes."""

    class Scaled(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(()))

    module, strategy = Scaled(), SimpleNamespace(tensor_parallel_size=1)
    with pytest.raises(UserError, match="Scaled has scale beside them: put such parameters into a net"):
        FSDP._refuse(strategy, module, [module.net])
    strategy.tensor_parallel_size = 2
    with pytest.raises(UserError, match="Linear has no method tensor_parallel_plan"):
        FSDP._refuse(strategy, L.LightningModule(), [module.net])
