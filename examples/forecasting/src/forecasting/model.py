"""A multilayer perceptron on the past, measured against the day before and the week before, repeated."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn


class Forecaster(L.LightningModule):
    def __init__(self, past: int = 168, future: int = 24, width: int = 256, dropout: float = 0.1, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(past, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU()
        )
        self.net.append(nn.Linear(width, future))

    def forward(self, past):
        """The hours to come [B, future], from those that were [B, past]; what is learned is relative to the newest."""
        newest = past[:, -1:]
        return newest + self.net(past - newest)

    def training_step(self, batch, batch_idx):
        loss = F.l1_loss(self(batch["past"]), batch["future"])
        self.log("train_mae", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_mae", F.l1_loss(self(batch["past"]), batch["future"]), prog_bar=True)

    def test_step(self, batch, batch_idx):
        past, future = batch["past"], batch["future"]
        days = {"day": 24, "week": 168}
        naive = {f"test_mae_{name}_before": past[:, -hours:][:, : future.shape[1]] for name, hours in days.items()}
        values = {"test_mae": self(past), **naive}
        self.log_dict({name: F.l1_loss(value, future) for name, value in values.items()})

    def predict_step(self, batch, batch_idx):
        return self(batch["past"])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_mae"}}
