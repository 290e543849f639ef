"""The default callbacks under DDP on two CPU processes, started as torchrun starts them."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG

pytestmark = pytest.mark.floats

SCRIPT = """
import math, sys
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Subset
from conftest import TinyData, TinyModule
from boltlab.callbacks.confusion_matrix import ConfusionMatrix
from boltlab.callbacks.nan_guard import NaNGuard
from boltlab.ground.errors import NonFiniteLoss
from boltlab.callbacks.progress import ProgressLines
from boltlab.callbacks.summary import ModelSummary
from boltlab.callbacks.throughput import Throughput
from boltlab.loggers.csv import CSVLogger

class Sharded(TinyData):
    def loader(self, seed):
        data = super().loader(seed).dataset
        rank = self.trainer.global_rank
        return torch.utils.data.DataLoader(Subset(data, range(rank, len(data), 2)), self.batch_size // 2)

class Module(TinyModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.current_epoch == 1 and batch_idx == 3 and self.global_rank == 1 else loss
    def log_epoch(self, split):
        pass

torch.set_num_threads(1)
throughput = Throughput()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, log_every_n_steps=1, logger=CSVLogger("run"),
    use_distributed_sampler=False, num_sanity_val_steps=0, enable_model_summary=False,
    callbacks=[NaNGuard(every_n_steps=3), throughput, ConfusionMatrix("run"), ModelSummary(), ProgressLines(),
               ModelCheckpoint("run/checkpoints", "last", enable_version_counter=False)],
)
trainer.test(Module(), datamodule=Sharded(samples=61), verbose=False)
try:
    trainer.fit(Module(), datamodule=Sharded())
except NonFiniteLoss as error:
    with open(f"rank{trainer.global_rank}.txt", "w") as file:  # on one terminal their lines can run into one another
        file.write(f"{throughput.samples} samples; {error}")
"""


@pytest.mark.slow
def test_numbers_are_those_of_all_processes_and_all_stop_together(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent)], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr

    table = list(csv.reader((tmp_path / "run" / "per_class_accuracy.csv").read_text().splitlines()))[1:]
    assert [(name, int(samples)) for name, samples, *_ in table] == [("a", 16), ("b", 15), ("c", 15), ("d", 15)]

    # 16 samples a step of both processes; the broken 8th step is seen at its epoch's end by the one that had it.
    stopped = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert [line.split(";")[0] for line in stopped] == ["128 samples", "128 samples"]
    for line in stopped:
        assert "loss is nan at step 8 (epoch 1, batch 3" in line and "(process 1)" in line

    import torch

    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())
    assert done.stdout.count("FLOPs/sample") == 1
    assert done.stdout.count("epoch 1/2") == 1
