"""A net with draws and state wherever Lightning has a hook, for the rows of loaders and trainer options."""

import random

import lightning as L
import numpy as np
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def tensors(batch):
    """The first x and y of whatever collection a batch is."""
    while not isinstance(batch[0] if isinstance(batch, (list, tuple)) else None, torch.Tensor):
        parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
        batch = next(part for part in parts if part is not None)
    return batch


def samples(batch):
    """All x of a batch of several loaders, one behind the other."""
    if isinstance(batch, torch.Tensor):
        return [batch] if batch.is_floating_point() else []
    if batch is None:
        return []
    parts = batch.values() if isinstance(batch, dict) else batch
    return [x for part in parts for x in samples(part)]


class Net(L.LightningModule):
    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.acc = MulticlassAccuracy(3)
        self.both = MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}, prefix="train_")
        self.outputs, self.epochs, self.scale = [], 0, 1.0

    def on_train_epoch_start(self):
        self.outputs = []
        self.scale = 1 + 0.1 * float(torch.rand(()))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            parts = samples(batch)
            for x in parts:
                x += 0.05 * torch.randn(x.shape) * self.scale
        return batch

    def training_step(self, batch, batch_idx):
        x = torch.cat([part.reshape(-1, 6) for part in samples(batch)])
        y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
        output = self.net(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
        loss = nn.functional.cross_entropy(output, y)
        self.acc(output, y)
        self.both.update(output, y)
        self.outputs.append(loss.detach())
        self.log("acc", self.acc, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("train_max", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=len(x))
        self.log("train_sum", loss, on_step=False, on_epoch=True, reduce_fx=sum, batch_size=len(x))
        if batch_idx % 2:
            self.log("odd", loss, batch_size=len(x))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("after", outputs["loss"] + torch.rand(()), batch_size=1)

    def on_train_epoch_end(self):
        self.epochs += 1
        self.log("mean", torch.stack(self.outputs).mean() + torch.rand(()))
        self.log_dict(self.both.compute())
        self.both.reset()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = torch.cat([part.reshape(-1, 6) for part in samples(batch)])
        loss = self.net(x + 0.1 * torch.randn(x.shape)).square().mean() + self.scale + self.epochs
        self.log("val_loss", loss, add_dataloader_idx=dataloader_idx > 0, batch_size=len(x))

    def on_validation_epoch_end(self):
        self.log("val_drawn", torch.rand(()))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Two(Net):
    """Of several validation loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx, 1)


class Hooked(Net):
    """Works in its own on_train_batch_end, freezes and takes a norm out of training when an epoch starts."""

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.net[0].requires_grad_(self.current_epoch != 1)
        self.net[1].train(self.current_epoch == 0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():
            self.net[4].bias.mul_(0.9)


class FromIterator(L.LightningModule):
    """Takes its batches from the loader by itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.2), nn.Linear(12, 5))

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Recorder(L.LightningModule):
    """Writes down what each step sees and draws, and logs values of the samples themselves; nothing is learned."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.acc = MulticlassAccuracy(2, average="micro")

    def _write(self, batch, stage):
        drawn = float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002
        with open(f"{stage}-{self.global_rank}", "a") as file:
            print(self.current_epoch, batch[0].flatten().int().tolist(), *drawn, sep=";", file=file)

    def training_step(self, batch, batch_idx):
        self._write(batch, "train")
        return self.net(batch[0]).square().mean() * 0

    def validation_step(self, batch, batch_idx):
        self._write(batch, "val")
        x = batch[0].flatten()
        self.acc((x % 3 == 0).long(), (x % 2 == 0).long())
        self.log("val_loss", x.square().mean(), sync_dist=True)
        self.log("val_sum", x.sum(), sync_dist=True, reduce_fx="sum")
        self.log("val_acc", self.acc)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class OnImages(L.LightningModule):
    """For the engine's data."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]) + random.random() * torch.rand(10), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]) + torch.rand(10), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)
