"""Digits anywhere on a canvas: two views of each, float [B, 2, 1, 12, 12], for training; for the rest images
[B, 1, 12, 12]. Labels int64 [B], which the training does not use."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset


def placed(image, generator=None):
    """The image [8, 8] at a place by chance on an empty canvas [1, 12, 12]."""
    y, x = torch.randint(5, (2,), generator=generator).tolist()
    canvas = torch.zeros(1, 12, 12)
    canvas[0, y : y + 8, x : x + 8] = image
    return canvas


class Views(Dataset):
    """Two views of each image, other ones at each time: place, brightness and noise are drawn."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        views = torch.stack([placed(self.images[index]) * (0.6 + 0.8 * torch.rand(())) for _ in range(2)])
        return views + 0.1 * torch.randn(views.shape)


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 128):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
        self.train, draws = Views(images[:1197]), torch.Generator().manual_seed(0)
        images = torch.stack([placed(image, draws) for image in images])
        self.val, self.test = (TensorDataset(images[a:b], labels[a:b]) for a, b in ((1197, 1497), (1497, 1797)))

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.hparams.batch_size)
