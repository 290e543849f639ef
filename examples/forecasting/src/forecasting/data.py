"""Twenty made-up series of the hours of a hundred days, with daily and weekly rhythms, weather and noise.

A batch is a dict: past float [B, past], future float [B, future]; the last ten days are for the test, the ten before
them for the validation.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset


def series(count, hours, generator):
    """Float [count, hours]."""
    time = torch.arange(hours)
    drawn = torch.rand(4, count, 1, generator=generator)
    day = (2 * torch.pi * (time / 24 + 0.2 * drawn[0])).sin() + 0.5 * (4 * torch.pi * (time / 24 + drawn[1])).sin()
    week = torch.where(time // 24 % 7 < 5, 1.0, 0.4 + 0.4 * drawn[2])
    weather = torch.zeros(count, hours)
    shocks = torch.randn(count, hours, generator=generator)
    for hour in range(1, hours):
        weather[:, hour] = 0.97 * weather[:, hour - 1] + 0.1 * shocks[:, hour]
    return 2 + 2 * drawn[3] + day * week + weather + 0.1 * torch.randn(count, hours, generator=generator)


class Windows(Dataset):
    """All windows of the hours between two."""

    def __init__(self, values, first, last, past, future):
        self.values, self.past = values[:, first - past : last], past
        self.starts = last - first - future + 1
        self.size = past + future

    def __len__(self):
        return len(self.values) * self.starts

    def __getitem__(self, index):
        window = self.values[index // self.starts].narrow(0, index % self.starts, self.size)
        return {"past": window[: self.past], "future": window[self.past :]}


class Series(L.LightningDataModule):
    def __init__(self, past: int = 168, future: int = 24, batch_size: int = 256):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        past, future = self.hparams.past, self.hparams.future
        values = series(20, 2400, torch.Generator().manual_seed(0))
        parts = ((past, 1920), (1920, 2160), (2160, 2400))
        self.train, self.val, self.test = (Windows(values, *part, past, future) for part in parts)

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.hparams.batch_size)
