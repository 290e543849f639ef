"""Small LightningModules of the kinds that people bring, as Lightning's docs write them."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassJaccardIndex,
    MultilabelAUROC,
    MultilabelF1Score,
    MultilabelPrecision,
)


class VAE(L.LightningModule):
    """Dropout and sampling in the step; three values of an epoch by `self.log_dict`."""

    def __init__(self, latent: int = 3, hidden: int = 12, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2))
        self.mu, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 6))

    def _step(self, batch, stage):
        h = self.encoder(batch[0])
        mu, logvar = self.mu(h), self.logvar(h)
        x_hat = self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))
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


class StepPlateau(VAE):
    """A plateau schedule that is stepped after each optimizer step, on a value of the newest validation."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3, threshold=0.5)
        config = {"scheduler": plateau, "monitor": "val_loss", "interval": "step", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class GAN(L.LightningModule):
    """Manual optimization of two optimizers; no validation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
        self.critic = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        real = batch[0]
        z = torch.randn(len(real), 3)
        self.toggle_optimizer(first)
        g_loss = F.softplus(-self.critic(self.generator(z))).mean()
        first.zero_grad()
        self.manual_backward(g_loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.generator(z).detach()
        d_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        second.zero_grad()
        self.manual_backward(d_loss)
        second.step()
        self.untoggle_optimizer(second)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, on_step=True, on_epoch=True)

    def configure_optimizers(self):
        parts = (self.generator, self.critic)
        return [torch.optim.Adam(part.parameters(), lr=1e-2, betas=(0.5, 0.9)) for part in parts], []


class Accumulating(L.LightningModule):
    """Two optimizers with a schedule each, one of which is stepped every third batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        loss = F.binary_cross_entropy_with_logits(self.head(self.dropout(self.body(batch[0]).relu())), batch[1])
        self.manual_backward(loss)
        head.step()
        head.zero_grad()
        if (batch_idx + 1) % 3 == 0:
            body.step()
            body.zero_grad()
        for schedule in self.lr_schedulers():
            schedule.step()
        self.log("train_loss", loss)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.head(self.body(batch[0]).relu()).square().mean())

    def configure_optimizers(self):
        optimizers = [
            torch.optim.AdamW(self.body.parameters(), 1e-2),
            torch.optim.SGD(self.head.parameters(), 0.1, 0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97) for optimizer in optimizers]


class MultiLabel(L.LightningModule):
    """A metric collection with groups in training too, and a schedule that asks for the number of steps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5))
        metrics = MetricCollection({"f1": MultilabelF1Score(5), "precision": MultilabelPrecision(5)})
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = MetricCollection({"f1": MultilabelF1Score(5), "auroc": MultilabelAUROC(5)}, prefix="val/")

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net(x)
        loss = F.binary_cross_entropy_with_logits(output, y)
        self.train_metrics.update(output.sigmoid(), y.int())
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log_dict(self.train_metrics.compute())
        self.train_metrics.reset()

    def validation_step(self, batch, batch_idx):
        output = self.net(batch[0])
        self.val_metrics.update(output.sigmoid(), batch[1].int())
        self.log("val_loss", F.binary_cross_entropy_with_logits(output, batch[1]))

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Segmentation(L.LightningModule):
    """Images [3, 8, 8] to masks [8, 8]; a metric object that is logged in each step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.train_iou, self.val_iou = MulticlassJaccardIndex(3), MulticlassJaccardIndex(3)

    def training_step(self, batch, batch_idx):
        output = self.net(batch["image"])
        self.train_iou(output, batch["mask"])
        self.log("train_miou", self.train_iou, on_step=False, on_epoch=True)
        return F.cross_entropy(output, batch["mask"])

    def validation_step(self, batch, batch_idx):
        output = self.net(batch["image"])
        self.val_iou(output, batch["mask"])
        self.log("val_loss", F.cross_entropy(output, batch["mask"]))
        self.log("val_miou", self.val_iou)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class CharGPT(L.LightningModule):
    """Tokens [B, T + 1]; tied weights, parameter groups, dropout in the attention."""

    def __init__(self, vocabulary: int = 11, width: int = 8):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(6, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def _loss(self, batch):
        x, y = batch[:, :-1], batch[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.block(self.tokens(x) + self.places(torch.arange(x.shape[1])), src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()})

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LSTM(L.LightningModule):
    """Sequences of different lengths, padded by a collate function."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 6, padding_idx=0), nn.LSTM(6, 8, batch_first=True)
        self.head, self.val_acc = nn.Linear(8, 3), MulticlassAccuracy(3)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(*batch[:2]), batch[2])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        output = self(*batch[:2])
        self.val_acc(output, batch[2])
        self.log("val_loss", F.cross_entropy(output, batch[2]), batch_size=len(output))
        self.log("val_acc", self.val_acc, batch_size=len(output))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class SimCLR(L.LightningModule):
    """Two drawn views of each sample; a plateau schedule on a value of the training epoch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    def _loss(self, batch):
        z = F.normalize(torch.cat([self.encoder(view) for view in batch]))
        n = len(z) // 2
        similar = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        return F.cross_entropy(similar, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}


class Detection(L.LightningModule):
    """A list of images and a list of dicts of boxes, different numbers of them; a step without boxes returns None."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 4)
        self.boxes_seen = 0
        self.train_error = MeanMetric()

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.boxes_seen += sum(len(target["boxes"]) for target in targets)
        if not any(len(target["boxes"]) for target in targets):
            return None
        output = self.head(self.net(torch.stack(images)))
        losses = [(box - o).abs().mean() for o, t in zip(output, targets, strict=True) for box in t["boxes"]]
        loss = torch.stack(losses).mean()
        self.train_error.update(loss.detach(), len(losses))
        self.log("train_error", self.train_error, on_step=True, on_epoch=True, batch_size=len(images))
        self.log("boxes_seen", float(self.boxes_seen), batch_size=len(images))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.head(self.net(torch.stack(batch[0]))).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.RAdam(self.parameters(), lr=1e-2)


class Forecast(L.LightningModule):
    """Windows of a series; outputs of the epoch in a list, and a bank of states in a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.net = nn.GRU(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)
        self.errors = []
        self.register_buffer("bank", torch.zeros(8), persistent=False)

    def _loss(self, batch):
        h = self.net(batch["past"])[0][:, -1]
        self.bank.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return F.mse_loss(self.head(h + self.bank), batch["next"])

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.errors.append(loss.detach())
        return {"loss": loss, "bank": self.bank}

    def on_train_epoch_end(self):
        self.log("train_error", torch.stack(self.errors).mean())
        self.errors.clear()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 2}]


class MNISTLit(L.LightningModule):
    """The kind of the most used template: net, optimizer and scheduler are arguments, with metrics of three kinds."""

    def __init__(self, width: int = 16, compile: bool = False):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc, self.val_acc = MulticlassAccuracy(5), MulticlassAccuracy(5)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MeanMetric()
        self.best = 0.0

    def on_train_start(self):
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def _step(self, batch):
        x, y = batch
        output = self.net(x)
        return self.criterion(output, y.argmax(1)), output.argmax(1), y.argmax(1)

    def training_step(self, batch, batch_idx):
        loss, predicted, y = self._step(batch)
        self.train_loss(loss)
        self.train_acc(predicted, y)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, predicted, y = self._step(batch)
        self.val_loss(loss)
        self.val_acc(predicted, y)
        self.log("val_loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self):
        acc = self.val_acc.compute()
        self.best = max(self.best, float(acc))
        self.val_acc_best.update(acc)
        self.log("val/acc_mean", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)
        self.log("val/acc_best", self.best)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.trainer.model.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        config = {"scheduler": plateau, "monitor": "val_loss", "interval": "epoch", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": config}
