"""The base of the image data modules: loaders carry uint8 [B,C,H,W]; the device makes normalized floats of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from boltlab.data.augment import Augment
from boltlab.data.base import DataModule, Split


class Fit:
    """An image (PIL, or uint8 tensor [..., C, H, W]) of any size becomes uint8 [..., C, H, W] of `input_shape`.

    It is scaled, keeping its proportions, until its shorter side is `resize` pixels (default: until it just covers
    the input), then cropped at the centre.
    """

    def __init__(self, input_shape: tuple[int, int, int], resize: int | None = None) -> None:
        self.input_shape, self.resize = input_shape, resize

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        channels, height, width = self.input_shape
        got_height, got_width = F.get_size(image)
        if self.resize is not None or (got_height, got_width) != (height, width):
            factor = 1.0 if self.resize is None else self.resize / min(height, width)
            cover_height, cover_width = round(height * factor), round(width * factor)
            if got_height * cover_width < got_width * cover_height:
                size = [cover_height, cover_height * got_width // got_height]
            else:
                size = [cover_width * got_height // got_width, cover_width]
            image = F.center_crop(F.resize(image, size, antialias=True), [height, width])
        tensor = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        if tensor.shape[-3] == channels:
            return tensor
        if tensor.shape[-3] == 1:
            return tensor.expand(*tensor.shape[:-3], channels, -1, -1)
        return F.rgb_to_grayscale(tensor, num_output_channels=channels)


class AugmentAndFit:
    """The training transform: an augmentation that crops to size itself sees the image as it is stored."""

    def __init__(self, augment: Augment, fit: Fit) -> None:
        self.augment = augment
        self.fit = Fit(fit.input_shape) if augment.resizes else fit

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        if self.augment.resizes:
            return self.fit(self.augment(image))
        augmented = self.augment(self.fit(image))
        assert isinstance(augmented, Tensor)
        return augmented


@dataclass(kw_only=True, eq=False, repr=False)
class ImageDataModule(DataModule):
    """Base of the image data sets. A loader yields uint8 [B,C,H,W] and int64 [B].

    input_shape: (channels, height, width) that the model sees; images of another size are resized and cropped.
    mean, std: of the channels, pixels scaled to 0..1; a single value stands for all channels.
    augment: built from configs/augment; used on training batches only.
    allow_flip: a mirrored image keeps its class (not so for digits and letters); the augmentation obeys it.
    resize: length of the shorter side before evaluation's centre crop; None means that of the crop.
    """

    input_shape: tuple[int, int, int] = (3, 224, 224)
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: Augment | None = None
    allow_flip: bool = True
    resize: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        channels, height, width = self.input_shape
        self.input_shape = (channels, height, width)
        self.fit = Fit(self.input_shape, self.resize)
        self._scale_and_shift: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = DataModule.check_arguments(arguments)
        shape = arguments.get("input_shape")
        if isinstance(shape, (list, tuple)) and len(shape) == 3 and all(isinstance(n, int) for n in shape):
            channels, height, width = shape
            if channels not in (1, 3) or min(height, width) < 1:
                problems.append(("input_shape", f"{list(shape)}: channels (1 or 3), height, width expected"))
            for name in ("mean", "std"):
                values = arguments.get(name)
                if isinstance(values, (list, tuple)) and len(values) not in (1, channels):
                    problems.append((name, f"{len(values)} values for the {channels} channels of input_shape"))
            resize = arguments.get("resize")
            if isinstance(resize, int) and resize < min(height, width):
                problems.append(("resize", f"{resize} is less than the crop of {min(height, width)} in input_shape"))
        names, number = arguments.get("class_names"), arguments.get("num_classes")
        if isinstance(names, (list, tuple)) and isinstance(number, int) and len(names) != number:
            problems.append(("num_classes", f"{number}, but class_names lists {len(names)}"))
        std = arguments.get("std")
        if isinstance(std, (list, tuple)) and any(isinstance(s, (int, float)) and s <= 0 for s in std):
            problems.append(("std", f"{list(std)}: a standard deviation is above 0"))
        return problems

    def transform(self, split: Split, augment: bool) -> tuple[Callable[[Any], Any], bool]:
        if augment and self.augment is not None and self.augment.active:
            return AugmentAndFit(self.augment, self.fit), True
        return self.fit, False

    def eval_transform(self, image: Image.Image) -> Tensor:
        """What evaluation does to one image from disk: uint8 [C,H,W]."""
        mode = "L" if self.input_shape[0] == 1 else "RGB"
        return self.fit(image if image.mode == mode else image.convert(mode))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B,C,H,W] to float32 of mean 0 and standard deviation 1 (by `mean` and `std`), on the same device."""
        scale, shift = self._channel_statistics(images.device)
        return images.float().mul_(scale).add_(shift)

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`: float [B,C,H,W] to uint8, clipped to 0..255."""
        scale, shift = self._channel_statistics(images.device)
        return images.float().sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, *rest = batch
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = self.normalize(x)
            if self.trainer is not None:  # precision=64 and bf16-true cast the batch before this hook, as uint8
                x = self.trainer.precision_plugin.convert_input(x)
        return type(batch)((x, *rest))

    def _channel_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._scale_and_shift:
            mean = torch.tensor([0.0] if self.mean is None else list(self.mean))
            std = torch.tensor([1.0] if self.std is None else list(self.std))
            scale, shift = 1 / (255 * std), -mean / std
            self._scale_and_shift[device] = (scale.view(-1, 1, 1).to(device), shift.view(-1, 1, 1).to(device))
        return self._scale_and_shift[device]
