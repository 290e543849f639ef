"""Lines of Python's own library: words int64 [B, length], padded with 0, and the module [B] that each line is from.

The source is read where Python is installed. A line that occurs twice is left out.
"""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset, random_split

MODULES = ("argparse", "ast", "datetime", "doctest", "mailbox", "tarfile", "turtle", "typing")


class Lines(L.LightningDataModule):
    def __init__(self, vocabulary: int = 2000, length: int = 24, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        library = Path(sysconfig.get_path("stdlib"))
        texts = [(library / f"{name}.py").read_text("utf-8").splitlines() for name in MODULES]
        count = Counter(line.strip() for text in texts for line in text)
        lines = [(line, label) for label, text in enumerate(texts) for line in text if count[line.strip()] == 1]
        words = [re.findall(r"\w+|[^\w\s]", line)[: self.hparams.length] for line, _ in lines]
        common = Counter(word for line in words for word in line).most_common(self.hparams.vocabulary - 2)
        numbers = {word: number for number, (word, _) in enumerate(common, 2)}  # 0 is no word, 1 a rare one
        rows = [[numbers.get(word, 1) for word in line] for line in words]
        x = torch.tensor([line + [0] * (self.hparams.length - len(line)) for line in rows])
        dataset = TensorDataset(x, torch.tensor([label for _, label in lines]))
        self.train, self.val, self.test = random_split(dataset, [0.7, 0.15, 0.15], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 4 * self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, 4 * self.hparams.batch_size)
