"""A generative adversarial network (Goodfellow et al., 2014): two optimizers, which training_step steps by itself."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn


def frechet(a, b):
    """Fréchet distance between normal distributions fitted to the pixels of two sets of images, [N, 1, 8, 8] each."""
    a, b = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()
    spread = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * spread).float()


class GAN(L.LightningModule):
    def __init__(self, latent: int = 32, width: int = 64, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent, 4 * width),
            nn.Unflatten(1, (width, 2, 2)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width, 1),
        )
        self.register_buffer("noise", torch.randn(300, latent))  # the same images are judged at each epoch

    def _loss(self, images, real):
        logits = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        generator, discriminator = self.optimizers()
        fakes = self.generator(torch.randn(len(images), self.hparams.latent, device=self.device))
        loss = (self._loss(images, 0.9) + self._loss(fakes.detach(), 0.0)) / 2  # 0.9: one-sided label smoothing
        self._step(discriminator, loss)
        self.log("train_discriminator_loss", loss, prog_bar=True)
        loss = self._loss(fakes, 1.0)
        self._step(generator, loss)
        self.log("train_generator_loss", loss, prog_bar=True)

    def _step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_frechet", frechet(self.generator(self.noise), batch[0]))

    def test_step(self, batch, batch_idx):
        self.log("test_frechet", frechet(self.generator(self.noise), batch[0]))
        self.log(
            "test_frechet_real", frechet(batch[0][::2], batch[0][1::2])
        )  # one half of the real images to the other

    def predict_step(self, batch, batch_idx):
        return self.generator(torch.randn(len(batch[0]), self.hparams.latent, device=self.device))

    def configure_optimizers(self):
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), self.hparams.lr, betas=(0.5, 0.999)) for net in nets]
