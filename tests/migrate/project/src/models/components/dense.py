"""A dense net whose widths are arguments."""

from torch import Tensor, nn


class Dense(nn.Module):
    """[B, …] → [B, outputs]."""

    def __init__(self, inputs: int = 2, width: int = 16, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
