"""scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grey levels: real data without a download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (doi:10.24432/C50P49), whose
test part this is. It has no official split: `test_fraction` is set aside, stratified, and never moves.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from boltlab.data import ImageDataModule, Split, TensorData
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

# Of 1.4 million pixels, those that kernels of AVX in 32 bits have rounded up and down, against 64 bits: places in all
# images. Every machine makes the images of every run so far.
UP = [192062, 197468, 210805, 298630, 354095, 362974, 370178, 377814, 386868, 402014, 456857, 534869, 538841, 661385]
UP += [721830, 742515, 993559, 1011182, 1021644, 1024143, 1182674, 1244888]
DOWN = [197983, 202843, 234013, 234041, 234069, 386102, 405968, 456494, 596059, 603300, 639149, 727642, 759636, 866750]
DOWN += [913394, 1004786, 1213821, 1236978, 1357795]


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
        pixels = torch.from_numpy(bunch.images).double().unsqueeze(1) * (255 / 16)
        images = interpolate(pixels, size=(28, 28), mode="bicubic").add(1e-7).round()  # the seven halves up
        images.view(-1)[UP] += 1
        images.view(-1)[DOWN] -= 1
        images = images.clamp(0, 255).to(torch.uint8)
        data = TensorData(images, torch.from_numpy(bunch.target).long())
        splits = self.three_splits(data.labels, self.test_fraction)
        return {split: data.subset(indices) for split, indices in splits.items()}

    def load(self, split: Split) -> TensorData:
        return self._splits[split]
