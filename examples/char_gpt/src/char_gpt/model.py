"""A small GPT (Radford et al., 2019) of characters; losses are in bits per character."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn


class GPT(L.LightningModule):
    def __init__(self, context: int = 64, width: int = 96, depth: int = 3, heads: int = 4, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.tokens, self.places = nn.Embedding(128, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)
        self.register_buffer("counts", torch.zeros(128))  # of each character in what was trained on

    def forward(self, text):
        """Logits [B, T, 128] of the character after each of text [B, T]."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, self.device)
        x = self.tokens(text) + self.places.weight[:length]
        return self.head(self.blocks(x, mask=mask, is_causal=True))

    def _bits(self, text):
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()) / math.log(2)

    def training_step(self, text, batch_idx):
        self.counts += text.flatten().bincount(minlength=128)
        loss = self._bits(text)
        self.log("train_bits", loss, prog_bar=True)
        return loss

    def validation_step(self, text, batch_idx):
        self.log("val_bits", self._bits(text), prog_bar=True)

    def test_step(self, text, batch_idx):
        unigram = ((self.counts + 1) / (self.counts + 1).sum()).log2()
        self.log_dict({"test_bits": self._bits(text), "test_bits_unigram": -unigram[text[:, 1:]].mean()})

    def predict_step(self, text, batch_idx):
        """A hundred characters [B, 100] after each text."""
        for _ in range(100):
            logits = self(text[:, -self.hparams.context :])[:, -1]
            text = torch.cat([text, logits.softmax(1).multinomial(1)], 1)
        return text[:, -100:]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
