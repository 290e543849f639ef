"""What exact resume costs a plain module: `python benchmarks/plain.py` (two minutes on two cores; --quick for a look).

The same LightningModule and the same `DataLoader(TensorDataset, shuffle=True)` are trained by Lightning's own Trainer
and by one with the seam of loaders and its callback, in turns, in this process; the ratio is the CPU time of a step.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from common import Row, in_turns, machine, show
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from boltlab.training.loaders import Seam, prepare
from boltlab.training.resume_state import Resume

BATCH_SIZE = 64


class Net(L.LightningModule):
    def __init__(self, logs: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logs = logs
        mlp = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)]
        lenet = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
        lenet += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
        self.net = nn.Sequential(*(mlp if len(shape) == 1 else [*lenet, nn.Linear(84, 10)]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.logs:
            self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def seconds_per_step(seam: bool, logs: bool, shape: tuple[int, ...], steps: int) -> float:
    """CPU time of a fit of two epochs by its steps; planning the order and making the batches are part of it."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(BATCH_SIZE * steps // 2, *shape), torch.randint(10, (BATCH_SIZE * steps // 2,)))
    callbacks = [Resume(found := Seam(300.0), None)] if seam else []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer: Any = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    if seam:
        found.trainer = trainer
        trainer.strategy.process_dataloader = partial(prepare, found, trainer.strategy.process_dataloader)
    module = Net(logs, shape)
    start = time.process_time()
    trainer.fit(module, DataLoader(data, BATCH_SIZE, shuffle=True))
    return (time.process_time() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    nets = {"MLP 64-128-10": ((64,), "1.06"), "LeNet on 28 × 28": ((1, 28, 28), "1.02")}
    for name, (shape, goal) in nets.items():
        for logs in (False, True):
            steps = (60 if quick else 600) if len(shape) == 1 else (40 if quick else 200)
            cases = {seam: partial(seconds_per_step, seam, logs, shape, steps) for seam in (True, False)}
            measured = in_turns(cases, rounds=2 if quick else 6)  # type: ignore[arg-type]
            ours, peer = ([1000 * value for value in measured[seam]] for seam in (True, False))  # type: ignore[index]
            what = f"{name}, `self.log` {'on step and epoch' if logs else 'not used'}"
            rows.append(Row(what, ours, peer, f"at most {goal}"))
    print(machine("torch", "lightning"))
    show("A plain module, batches of 64: with exact resume and without", "ms of CPU time a step", rows)


if __name__ == "__main__":
    main()
