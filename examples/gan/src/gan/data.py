"""Handwritten digits that scikit-learn ships: images float [B, 1, 8, 8] in -1..1, labels int64 [B]."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        dataset = TensorDataset(images, torch.tensor(labels))
        parts = random_split(dataset, [1197, 300, 300], torch.Generator().manual_seed(0))
        self.train, self.val, self.test = parts

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, len(self.val))  # one batch: the distance is one of distributions

    def test_dataloader(self):
        return DataLoader(self.test, len(self.test))
