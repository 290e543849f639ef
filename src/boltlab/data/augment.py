"""Augmentation of single training images with torchvision.transforms.v2; every file of configs/augment sets this class.

An image is a PIL image or a uint8 tensor [C,H,W]; it comes back as the same kind. All draws come from torch's default
CPU generator, which the data module seeds for each (seed, epoch, sample).
"""

from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2


class Augment:
    """Crop, flip, rotation and a policy, in that order; each is off by default.

    input_shape: (C, H, W) of what comes out.
    allow_flip, flip_probability: mirrors left to right; `allow_flip=false` (digits, letters) switches it off.
    crop: "padded" pads each side by `padding` pixels ("auto": an eighth of the shorter side) and takes a random window
        of the input's size; "resized" takes a random part of the stored image (`min_area`..1 of its area, sides in
        ratio 3/4..4/3) and scales it to the input's size (Inception crop, arXiv:1409.4842).
    degrees: rotates by up to that much either way.
    policy: "randaugment" (arXiv:1909.13719; `num_ops` operations of strength `magnitude`, 0..30) or "trivialaugment"
        (arXiv:2103.10158; one operation of random strength).
    fill: grey value 0..255 of what the crop, rotation and policy uncover.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        allow_flip: bool = True,
        flip_probability: float = 0.0,
        crop: Literal["none", "padded", "resized"] = "none",
        padding: int | Literal["auto"] = "auto",
        padding_mode: Literal["constant", "reflect", "edge", "symmetric"] = "constant",
        min_area: float = 0.08,
        degrees: float = 0.0,
        policy: Literal["none", "randaugment", "trivialaugment"] = "none",
        num_ops: int = 2,
        magnitude: int = 9,
        fill: int = 0,
    ) -> None:
        _, height, width = input_shape
        bilinear: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": fill}
        steps: list[nn.Module] = []
        if crop == "padded":
            pixels = round(min(height, width) / 8) if padding == "auto" else padding
            steps.append(v2.RandomCrop((height, width), padding=pixels, fill=fill, padding_mode=padding_mode))
        elif crop == "resized":
            steps.append(v2.RandomResizedCrop((height, width), scale=(min_area, 1.0), antialias=True))
        if allow_flip and flip_probability > 0:
            steps.append(v2.RandomHorizontalFlip(flip_probability))
        if degrees > 0:
            steps.append(v2.RandomRotation(degrees, **bilinear))
        if policy == "randaugment":
            steps.append(v2.RandAugment(num_ops, magnitude, **bilinear))
        elif policy == "trivialaugment":
            steps.append(v2.TrivialAugmentWide(**bilinear))
        self.steps = steps
        self.active = bool(steps)
        self.resizes = crop == "resized"  # wants the stored image, before it is fitted to the input's size

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = []
        for name, low, high in (("flip_probability", 0, 1), ("min_area", 0, 1), ("degrees", 0, 180), ("fill", 0, 255),
                                ("magnitude", 0, 30), ("padding", 0, 10_000), ("num_ops", 1, 100)):  # fmt: skip
            value = arguments.get(name)
            if isinstance(value, (int, float)) and not low <= value <= high:
                problems.append((name, f"{value} is outside {low}..{high}"))
        return problems

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        for step in self.steps:
            image = step(image)
        return image
