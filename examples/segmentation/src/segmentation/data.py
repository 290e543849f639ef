"""Scenes of three digits on a canvas: images float [B, 1, 24, 24] with noise, masks int64 [B, 24, 24].

A mask has 0 where nothing was drawn, and 1 + the digit where one was.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


def scenes(digits, labels, count, generator):
    """Each digit is drawn over those before it."""
    images = 0.3 * torch.rand(count, 1, 24, 24, generator=generator)
    masks = torch.zeros(count, 24, 24, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        for index in torch.randint(len(digits), (3,), generator=generator).tolist():
            y, x = torch.randint(17, (2,), generator=generator).tolist()
            drawn = digits[index] > 0.3
            image[0, y : y + 8, x : x + 8][drawn] = digits[index][drawn]
            mask[y : y + 8, x : x + 8][drawn] = 1 + labels[index]
    return TensorDataset(images, masks)


class Scenes(L.LightningDataModule):
    def __init__(self, batch_size: int = 32, train_size: int = 3000):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        digits, labels = load_digits(return_X_y=True)
        digits, labels = torch.tensor(digits, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
        generator = torch.Generator().manual_seed(0)
        parts = [(0, 1197, self.hparams.train_size), (1197, 1497, 200), (1497, 1797, 200)]
        self.train, self.val, self.test = (scenes(digits[a:b], labels[a:b], n, generator) for a, b, n in parts)

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, self.hparams.batch_size)
