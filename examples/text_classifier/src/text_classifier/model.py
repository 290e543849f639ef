"""A Transformer's encoder (Vaswani et al., 2017) whose outputs are averaged over the words."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy


class Classifier(L.LightningModule):
    def __init__(
        self,
        vocabulary: int = 2000,
        length: int = 24,
        num_classes: int = 8,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.2,
        lr: float = 2e-3,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.words, self.places = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))
        self.val_acc, self.test_acc = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))

    def forward(self, words):
        """Logits [B, num_classes] of lines [B, length]."""
        padding = words == 0
        x = self.blocks(self.words(words) + self.places.weight, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        words, labels = batch
        loss = F.cross_entropy(self(words), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        words, labels = batch
        logits = self(words)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch, batch_idx):
        words, labels = batch
        logits = self(words)
        self.test_acc(logits, labels)
        self.log("test_acc", self.test_acc)
        return {"output": logits, "target": labels}  # for the confusion matrix

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
