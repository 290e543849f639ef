"""SimCLR (Chen et al., 2020): the two views of an image are nearer to each other than to those of all others."""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn


def nearest(features, labels):
    """The share of samples whose nearest neighbour by cosine has the same label."""
    features = F.normalize(features, dim=1)
    similarity = (features @ features.T).fill_diagonal_(-1)
    return (labels[similarity.argmax(1)] == labels).float().mean()


class SimCLR(L.LightningModule):
    def __init__(self, width: int = 32, features: int = 32, temperature: float = 0.2, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        layers = []
        for inputs, outputs, stride in ((1, width, 1), (width, width, 2), (width, 2 * width, 2)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        hidden = 2 * width
        layers += [nn.Flatten(), nn.Linear(9 * hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, features))
        self.untrained = copy.deepcopy(self.net).requires_grad_(False)  # to compare with
        self.seen = []

    def forward(self, images):
        """Features [B, features] of images [B, 1, 12, 12]."""
        return self.net(images)

    def training_step(self, views, batch_idx):
        features = F.normalize(self(views.flatten(0, 1)), dim=1)
        similarity = (features @ features.T / self.hparams.temperature).fill_diagonal_(-torch.inf)
        other = torch.arange(len(features), device=self.device) ^ 1  # the views of an image follow each other
        loss = F.cross_entropy(similarity, other)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self(images), self.untrained(images), labels))

    def on_validation_epoch_end(self, stage="val"):
        trained, untrained, labels = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen = []
        values = {f"{stage}_acc": nearest(trained, labels), f"{stage}_acc_untrained": nearest(untrained, labels)}
        self.log_dict(values, prog_bar=True)

    test_step = validation_step

    def on_test_epoch_end(self):
        self.on_validation_epoch_end("test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]
