"""A variational autoencoder (Kingma and Welling, 2013) of grey values."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import R2Score


class VAE(L.LightningModule):
    def __init__(self, latent: int = 8, width: int = 256, beta: float = 1.0, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64)
        )
        # The share of the pixels' variance that is in the reconstructions: 0 is the mean image.
        self.val_r2, self.test_r2 = (R2Score(multioutput="variance_weighted") for _ in range(2))

    def forward(self, images):
        """The logits of the pixels [B, 64], and mean and logarithm of the variance of the code [B, latent]."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), mean, log_variance

    def _loss(self, batch, stage):
        logits, mean, log_variance = self(batch[0])
        reconstruction = F.binary_cross_entropy_with_logits(logits, batch[0].flatten(1), reduction="sum") / len(mean)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        loss = reconstruction + self.hparams.beta * divergence
        values = {"loss": loss, "reconstruction": reconstruction, "divergence": divergence}
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, on_step=False, on_epoch=True)
        return loss, logits.sigmoid()

    def training_step(self, batch, batch_idx):
        return self._loss(batch, "train")[0]

    def validation_step(self, batch, batch_idx):
        self.val_r2(self._loss(batch, "val")[1], batch[0].flatten(1))
        self.log("val_r2", self.val_r2)

    def test_step(self, batch, batch_idx):
        self.test_r2(self._loss(batch, "test")[1], batch[0].flatten(1))
        self.log("test_r2", self.test_r2)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])[1]  # the codes

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)
