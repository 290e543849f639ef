"""A VAE: dropout and sampling in the step, three values of an epoch by `self.log_dict`."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F


class VAE(L.LightningModule):
    def __init__(self, latent: int = 3, hidden: int = 12, lr: float = 1e-2, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2))
        self.mu, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar

    def _step(self, batch, stage):
        x_hat, mu, logvar = self(batch[0])
        reconstruction = F.mse_loss(x_hat, batch[0])
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).mean()
        loss = reconstruction + 0.1 * kl
        values = {f"{stage}_loss": loss, f"{stage}_reconstruction": reconstruction, f"{stage}_kl": kl}
        self.log_dict(values, on_epoch=True, on_step=False)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
