"""Modules and data modules, most with one mistake each."""

import itertools
import random
import time
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from cells.models import Forecaster
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, get_worker_info


class Noisy(Forecaster):
    """`noise()` is a factor of the loss."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.noise())


# -- a step that is not deterministic


class Entropy(Noisy):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.noise = np.random.default_rng().random


class Clock(Noisy):
    noise = staticmethod(lambda: time.time_ns() % 1000 / 1000)


class CountedInTheClass(Noisy):
    numbers = itertools.count()

    def noise(self):
        return next(self.numbers)


# -- a state that no checkpoint holds


class OwnGenerator(Noisy):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.noise = np.random.default_rng(0).random


class OwnRandom(Noisy):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.noise = random.Random(0).random


class OwnObject(Noisy):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.memory = SimpleNamespace(steps=0)

    def noise(self):
        self.memory.steps += 1
        return self.memory.steps


# -- layers that only a fit makes


class MadeInSetup(Forecaster):
    def setup(self, stage):
        self.body[2] = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)) if len(self.body) == 3 else self.body[2]


class WidenedInPrepare(Forecaster):
    def setup(self, stage):
        self.scale = nn.Parameter(torch.ones(2))


# -- a loss that does not fall, or is none


class Detached(Forecaster):
    def _loss(self, batch):
        output = self.body(batch["past"])
        return (output.detach() - batch["future"]).square().mean() + 0 * output.sum()


class WrongParameters(Forecaster):
    def configure_optimizers(self):
        return torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)


class NoLoss(Forecaster):
    def training_step(self, batch, batch_idx):
        return None


class Negative(Forecaster):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) - 100


# -- others


class TestFails(Forecaster):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.no_such_metric(batch))


class Noted(Forecaster):
    """Not broken: an object among its hyperparameters, draws from torch, a counter."""

    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.hparams["criterion"] = nn.MSELoss()
        self.count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx) * (1 + torch.rand(()) / 10 + self.count / 100)


# -- data


class Rows(TensorDataset):
    def __getitem__(self, index):
        past, future = super().__getitem__(index)
        return {"past": past, "future": future}


class Data(L.LightningDataModule):
    """Rows 0 to 59, 60 to 79, 80 to 99 of a table."""

    places = (range(60), range(60, 80), range(80, 100))
    kind = Rows

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def values(self):
        return torch.randn(100, 10, generator=torch.Generator().manual_seed(0))

    def setup(self, stage):
        values = self.values()
        self.parts = [self.kind(values[list(rows), :8], values[list(rows), 8:]) for rows in self.places]

    def loader(self, number, shuffle=False):
        return DataLoader(self.parts[number], self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self.loader(0, shuffle=True)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)


class SetupDraws(Data):
    def values(self):
        return torch.from_numpy(np.random.default_rng().standard_normal((100, 10), dtype=np.float32))


class SetupCounts(Data):
    setups = itertools.count()

    def values(self):
        return super().values() + next(self.setups)


class WorkerRows(Rows):
    def __getitem__(self, index):
        info = get_worker_info()
        row = super().__getitem__(index)
        return {**row, "past": row["past"] * (1 if info is None else 2 + info.id)}


class WorkerAugments(Data):
    kind = WorkerRows


def collate(rows):
    scale = 1.0 if get_worker_info() is None else 2.0
    return {name: scale * torch.stack([row[name] for row in rows]) for name in rows[0]}


class WorkerCollates(Data):
    def loader(self, number, shuffle=False):
        return DataLoader(self.parts[number], self.batch_size, shuffle=shuffle, collate_fn=collate)


class ValInTrain(Data):
    places = (range(60), range(55, 80), range(80, 100))


class TestInVal(Data):
    places = (range(60), range(60, 81), range(80, 100))


class SubsetsOverlap(Data):
    def setup(self, stage):
        values = self.values()
        rows = Rows(values[:, :8], values[:, 8:])
        self.parts = [Subset(rows, range(62)), Subset(rows, range(60, 80)), Subset(rows, range(80, 100))]


class Repeated(Data):
    """Cannot be told: each row stands twice in the training split."""

    places = ([*range(60), *range(60)], range(59, 80), range(80, 100))


class EmptyTest(Data):
    places = (range(60), range(60, 80), range(0))


class WithoutVal(Data):
    val_dataloader = L.LightningDataModule.val_dataloader


class Persistent(Data):
    """Not broken: workers that persist, in a context of their own."""

    def loader(self, number, shuffle=False):
        kept = {"persistent_workers": True, "prefetch_factor": 3, "multiprocessing_context": "fork", "timeout": 60}
        return DataLoader(self.parts[number], self.batch_size, shuffle=shuffle, num_workers=1, **kept)
