"""Three spirals of points in a plane, written into a file once, as a download would be."""

from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split


class SpiralsDataModule(LightningDataModule):
    def __init__(
        self, data_dir="data/", train_val_test_split=(80, 32, 32), batch_size=16, num_workers=0, pin_memory=False
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.splits = None

    @property
    def path(self):
        return Path(self.hparams.data_dir) / "spirals.npz"

    def prepare_data(self):
        if self.path.exists():
            return
        generator = np.random.default_rng(0)
        count = sum(self.hparams.train_val_test_split)
        y = generator.integers(3, size=count)
        radius = generator.random(count)
        angle = 4 * radius + y * 2 * np.pi / 3 + generator.normal(0, 0.2, count)
        x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(self.path, x=x, y=y)

    def setup(self, stage=None):
        if self.splits is None:
            with np.load(self.path) as file:
                dataset = TensorDataset(torch.from_numpy(file["x"]), torch.from_numpy(file["y"]))
            generator = torch.Generator().manual_seed(42)
            self.splits = random_split(dataset, self.hparams.train_val_test_split, generator=generator)
        devices = self.trainer.world_size if self.trainer else 1
        self.batch_size_per_device = self.hparams.batch_size // devices

    def _loader(self, number, shuffle=False):
        return DataLoader(
            self.splits[number],
            batch_size=self.batch_size_per_device,
            shuffle=shuffle,
            num_workers=self.hparams.num_workers,
            pin_memory=self.hparams.pin_memory,
        )

    def train_dataloader(self):
        return self._loader(0, shuffle=True)

    def val_dataloader(self):
        return self._loader(1)

    def test_dataloader(self):
        return self._loader(2)
