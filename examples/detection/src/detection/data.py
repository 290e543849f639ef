"""Scenes of one to four digits of several sizes. A batch is images float [B, 1, 48, 48] and a list of B targets:
{"boxes": float [N, 4] of left, top, right, bottom in pixels, "labels": int64 [N]}."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader


def scene(digits, labels, generator):
    image, drawn = 0.2 * torch.rand(1, 48, 48, generator=generator), []
    for index in torch.randint(len(digits), (int(torch.randint(1, 5, (), generator=generator)),), generator=generator):
        size = int(torch.randint(10, 19, (), generator=generator))
        x, y = torch.randint(49 - size, (2,), generator=generator).tolist()
        ink = F.interpolate(digits[index][None, None], size=size, mode="bilinear")[0, 0]
        image[0, y : y + size, x : x + size].clamp_(min=ink)
        drawn.append([x, y, x + size, y + size, labels[index]])
    drawn = torch.tensor(drawn)
    return image, {"boxes": drawn[:, :4].float(), "labels": drawn[:, 4]}


def collate(samples):
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


class Scenes(L.LightningDataModule):
    def __init__(self, batch_size: int = 32, train_size: int = 2000):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        digits, labels = load_digits(return_X_y=True)
        digits, labels = torch.tensor(digits, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
        draws = torch.Generator().manual_seed(0)
        parts = [(0, 1197, self.hparams.train_size), (1197, 1497, 200), (1497, 1797, 200)]
        self.parts = [[scene(digits[a:b], labels[a:b], draws) for _ in range(count)] for a, b, count in parts]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.hparams.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.hparams.batch_size, collate_fn=collate)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.hparams.batch_size, collate_fn=collate)
