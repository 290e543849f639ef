"""A classifier that is given its net, and partials of its optimizer and its schedule."""

import torch
from lightning import LightningModule
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class SpiralsModule(LightningModule):
    def __init__(self, net, optimizer, scheduler, compile):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.loss = torch.nn.CrossEntropyLoss()
        self.means = torch.nn.ModuleDict({split: MeanMetric() for split in ("on_train", "on_val", "on_test")})
        self.accuracies = torch.nn.ModuleDict({s: MulticlassAccuracy(3) for s in ("on_train", "on_val", "on_test")})
        self.best = MaxMetric()

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        # Lightning's sanity check has updated them.
        self.means["on_val"].reset()
        self.accuracies["on_val"].reset()
        self.best.reset()

    def _step(self, batch, split):
        x, y = batch
        logits = self(x)
        loss = self.loss(logits, y)
        mean, accuracy = self.means[f"on_{split}"], self.accuracies[f"on_{split}"]
        mean(loss)
        accuracy(logits.argmax(1), y)
        self.log(f"{split}/loss", mean, on_step=False, on_epoch=True, prog_bar=True)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def on_validation_epoch_end(self):
        self.best(self.accuracies["on_val"].compute())
        self.log("val/acc_best", self.best.compute(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return optimizer
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
