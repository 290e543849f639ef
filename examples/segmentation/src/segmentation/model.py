"""A U-Net (Ronneberger et al., 2015) of three resolutions."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(L.LightningModule):
    def __init__(self, num_classes: int = 11, width: int = 16, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.first, self.second, self.third = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)
        self.val_iou, self.test_iou = (MulticlassJaccardIndex(num_classes) for _ in range(2))

    def forward(self, images):
        """Logits [B, num_classes, H, W]."""
        first = self.first(images)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([second, F.interpolate(third, scale_factor=2.0)], 1))
        return self.head(self.up1(torch.cat([first, F.interpolate(x, scale_factor=2.0)], 1)))

    def training_step(self, batch, batch_idx):
        images, masks = batch
        loss = F.cross_entropy(self(images + 0.1 * torch.randn_like(images)), masks)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, masks = batch
        logits = self(images)
        self.val_iou(logits, masks)
        self.log("val_loss", F.cross_entropy(logits, masks))
        self.log("val_iou", self.val_iou, prog_bar=True)

    def test_step(self, batch, batch_idx):
        self.test_iou(self(batch[0]), batch[1])
        self.log("test_iou", self.test_iou)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
