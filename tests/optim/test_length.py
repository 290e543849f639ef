"""The length that a schedule is made for is the number of steps that are taken."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from boltlab.ground.errors import UserError
from boltlab.optim import Cosine, configure
from boltlab.optim.schedulers import MultiStep
from boltlab.training.accumulation import Counting


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(14, 2))


class Module(pl.LightningModule):
    def __init__(self, schedule):
        super().__init__()
        self.net, self.schedule, self.factors = torch.nn.Linear(2, 1), schedule, []

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def on_before_zero_grad(self, optimizer):
        self.factors.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return configure(self, self.net, partial(torch.optim.SGD, lr=1.0), self.schedule)


def train(schedule, callbacks=(), data=None, **given):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=list(callbacks), enable_model_summary=False, **quiet, **given)
    if callbacks:
        trainer.__class__ = Counting
    module = Module(schedule)
    trainer.fit(module, DataLoader(torch.zeros(14, 2) if data is None else data))
    return trainer, module


@pytest.mark.parametrize(
    ("scheduling", "given"),
    [
        ({0: 1, 2: 4}, {"max_epochs": 4}),
        ({1: 3}, {"max_epochs": 3, "limit_train_batches": 5}),
        ({0: 2, 1: 3}, {"max_epochs": 3, "max_steps": 9}),
        ({0: 5}, {"max_epochs": 2, "limit_train_batches": 0.5}),
    ],
)
def test_a_cosine_ends_with_the_training(scheduling, given):
    trainer, module = train(Cosine(), [GradientAccumulationScheduler(scheduling)], **given)
    assert trainer.estimated_stepping_batches == trainer.global_step == len(module.factors)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
    assert len(set(module.factors)) > 1


def test_epochs_of_several_lengths_have_none_for_a_milestone():
    with pytest.raises(UserError, match="in steps, not in epochs"):
        train(MultiStep(milestones_epochs=[1]), [GradientAccumulationScheduler({0: 1, 1: 4})], max_epochs=2)


def test_a_loader_without_a_length_has_none_for_a_cosine():
    with pytest.raises(UserError, match="needs the length of the run"):
        train(Cosine(), data=Endless(), max_epochs=2)
    trainer, _ = train(Cosine(), data=Endless(), max_epochs=2, max_steps=20)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
