"""scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grey levels: real data without a download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (doi:10.24432/C50P49), whose
test part this is. It has no official split: `test_fraction` is set aside, stratified, and never moves.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from boltlab.data.base import Split
from boltlab.data.images import ImageDataModule
from boltlab.data.loader import TensorData


@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ImageDataModule):
    """Images uint8 [B,1,28,28], enlarged from 8x8 (bicubic) so that nets made for MNIST fit; ten classes.

    test_fraction: share of the images set aside for testing.
    """

    input_shape: tuple[int, int, int] = (1, 28, 28)
    num_classes: int | Literal["auto"] | None = 10
    class_names: list[str] | Literal["auto"] | None = field(default_factory=lambda: list("0123456789"))
    mean: list[float] | None = field(default_factory=lambda: [0.3133])
    std: list[float] | None = field(default_factory=lambda: [0.3569])
    allow_flip: bool = False
    test_fraction: float = 0.2

    @cached_property
    def _splits(self) -> dict[Split, TensorData]:
        bunch = load_digits()
        pixels = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
        images = interpolate(pixels, size=(28, 28), mode="bicubic").round().clamp(0, 255).to(torch.uint8)
        data = TensorData(images, torch.from_numpy(bunch.target).long())
        splits = self.three_splits(data.labels, self.test_fraction)
        return {split: data.subset(indices) for split, indices in splits.items()}

    def load(self, split: Split) -> TensorData:
        return self._splits[split]
