"""Strings of the embedded Reber grammar, the first benchmark of the LSTM (Hochreiter and Schmidhuber, 1997).

Half of them have one letter changed and are no longer of the grammar. A batch has letters int64 [B, longest], padded
with 0, lengths [B] and labels [B]: 1 for a string of the grammar.
"""

import random

import lightning as L
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

LETTERS = "-BTPSXVE"
# Of each state: what may be written, and the state after it; 0 is the end.
GRAMMAR = {1: "T2 P3", 2: "S2 X4", 3: "T3 V5", 4: "X3 S6", 5: "P4 V6", 6: "E0"}


def reber(draw):
    state, text = 1, "B"
    while state:
        letter, following = draw.choice(GRAMMAR[state].split())
        text, state = text + letter, int(following)
    return text


def valid(text):
    """Whether a string is B, T or P, a string of the grammar, the same T or P, E."""
    state, inner = 1, text[3:-2]
    for letter in inner:
        state = next((int(way[1]) for way in GRAMMAR.get(state, "").split() if way[0] == letter), -1)
    return state == 0 and text[:1] + text[2:3] + text[-1:] == "BBE" and text[1] == text[-2] and text[1] in "TP"


def sample(draw, right):
    ends = draw.choice("TP")
    text = f"B{ends}{reber(draw)}{ends}E"
    while valid(text) != right:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(LETTERS[1:]) + text[place + 1 :]
    return torch.tensor([LETTERS.index(letter) for letter in text]), int(right)


def collate(samples):
    texts, labels = zip(*samples, strict=True)
    return pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts]), torch.tensor(labels)


class Strings(L.LightningDataModule):
    def __init__(self, batch_size: int = 64, train_size: int = 6000):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        draw = random.Random(0)
        counts = (self.hparams.train_size, 1000, 1000)
        self.parts = [[sample(draw, i % 2 == 0) for i in range(count)] for count in counts]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.hparams.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.hparams.batch_size, collate_fn=collate)

    def test_dataloader(self):
        return DataLoader(self.parts[2], self.hparams.batch_size, collate_fn=collate)
