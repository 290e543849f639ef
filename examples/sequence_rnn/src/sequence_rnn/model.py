"""An LSTM that reads each string to its own end."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics.classification import BinaryAccuracy


class RNN(L.LightningModule):
    def __init__(self, num_letters: int = 8, width: int = 64, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.letters = nn.Embedding(num_letters, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 1)
        self.val_acc, self.test_acc = BinaryAccuracy(), BinaryAccuracy()

    def forward(self, letters, lengths):
        """Logits [B] that strings [B, longest] are of the grammar."""
        packed = pack_padded_sequence(self.letters(letters), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.head(last[0])[:, 0]

    def _loss(self, logits, labels):
        return F.binary_cross_entropy_with_logits(logits, labels.float())

    def training_step(self, batch, batch_idx):
        letters, lengths, labels = batch
        loss = self._loss(self(letters, lengths), labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch, batch_idx):
        letters, lengths, labels = batch
        logits = self(letters, lengths)
        self.val_acc(logits, labels)
        self.log("val_loss", self._loss(logits, labels), batch_size=len(labels))
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch, batch_idx):
        letters, lengths, labels = batch
        self.test_acc(self(letters, lengths), labels)
        self.log("test_acc", self.test_acc, batch_size=len(labels))

    def predict_step(self, batch, batch_idx):
        return self(batch[0], batch[1]).sigmoid()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)
