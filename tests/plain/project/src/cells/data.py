"""Data modules as Lightning's docs write them; none knows boltlab."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, random_split


class _Splits(L.LightningDataModule):
    """`splits` gives train, val and test; all keep to Lightning's own hooks."""

    collate = None

    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        self.parts = dict(zip(("train", "val", "test"), self.splits(), strict=True))

    def _loader(self, split, shuffle=False):
        size = self.hparams.batch_size
        return DataLoader(self.parts[split], batch_size=size, shuffle=shuffle, collate_fn=self.collate)

    def train_dataloader(self):
        return self._loader("train", shuffle=True)

    def val_dataloader(self):
        return self._loader("val")

    def test_dataloader(self):
        return self._loader("test")


class Digits(_Splits):
    """float [B, 1, 8, 8] in 0..1, int64 [B]."""

    def splits(self):
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x[:160], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y[:160])
        return random_split(TensorDataset(x, y), [96, 33, 31], torch.Generator().manual_seed(0))

    def predict_dataloader(self):
        return DataLoader(self.parts["test"], 16)  # the batch size by its place, as torch's docs write it


class MultiLabelData(_Splits):
    """float [B, 6], float [B, 3]; keeps the mean of its training rows in every checkpoint."""

    mean = None

    def splits(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(140, 6, generator=generator) + 3
        y = ((x - 3) @ torch.randn(6, 3, generator=generator) > 0).float()
        if self.mean is None:
            self.mean = x[:80].mean(0)
        x = x - self.mean
        return [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 80), (80, 107), (107, 140))]

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state_dict):
        self.mean = state_dict["mean"]


def padded(items):
    tokens, labels = zip(*items, strict=True)
    return pad_sequence(tokens, batch_first=True), torch.tensor([len(t) for t in tokens]), torch.tensor(labels)


class Sequences(_Splits):
    """Tokens [B, longest], lengths [B], labels [B]: in which third is the largest token?"""

    collate = staticmethod(padded)
    class_names = ("first", "middle", "last")

    def splits(self):
        generator = torch.Generator().manual_seed(2)
        items = []
        for length in torch.randint(4, 9, (130,), generator=generator).tolist():
            tokens = torch.randint(1, 12, (length,), generator=generator)
            items.append((tokens, int(tokens.argmax()) * 3 // length))
        return items[:80], items[80:107], items[107:]


def named(items):
    return {"past": torch.stack([past for past, _ in items]), "future": torch.stack([future for _, future in items])}


class Series(_Splits):
    """A batch is a dict: past [B, 8], future [B, 2] of a sine."""

    collate = staticmethod(named)

    def splits(self):
        values = torch.sin(torch.arange(150) / 5)
        windows = [(values[i : i + 8], values[i + 8 : i + 10]) for i in range(140)]
        return windows[:90], windows[90:115], windows[115:]
