"""Vectors with targets, in plain DataLoaders whose form is chosen by name."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Table(L.LightningDataModule):
    def __init__(self, batch_size: int = 8, num_workers: int = 0, samples: int = 52, width: int = 6):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(self.hparams.samples + 20, self.hparams.width, generator=g)
        y = (x @ torch.randn(self.hparams.width, 5, generator=g) > 0.3).float()
        n = self.hparams.samples
        self.parts = {"train": TensorDataset(x[:n], y[:n]), "val": TensorDataset(x[n:], y[n:])}

    def _loader(self, split):
        h = self.hparams
        return DataLoader(self.parts[split], h.batch_size, shuffle=split == "train", num_workers=h.num_workers)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")

    test_dataloader = val_dataloader
