"""The reference of the Python language, which comes with Python itself: windows of characters, int64 [B, context + 1].

A character is its ASCII code. The last tenth of the text is for the test, the tenth before it for the validation.
"""

from pydoc_data.topics import topics

import lightning as L
import torch
from torch.utils.data import DataLoader, RandomSampler


class Text(L.LightningDataModule):
    def __init__(self, context: int = 64, batch_size: int = 32, steps: int = 200):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
        text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        size = self.hparams.context + 1
        tenth = len(text) // 10
        self.train = text[: -2 * tenth].unfold(0, size, 1)
        self.val, self.test = (part.unfold(0, size, size - 1) for part in (text[-2 * tenth : -tenth], text[-tenth:]))

    def train_dataloader(self):
        windows = RandomSampler(self.train, num_samples=self.hparams.steps * self.hparams.batch_size)
        return DataLoader(self.train, self.hparams.batch_size, sampler=windows)

    def val_dataloader(self):
        return DataLoader(self.val, 4 * self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, 4 * self.hparams.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.test[:8], 8)
