"""The base of the image data modules: loaders carry uint8 [B,C,H,W]; the device makes normalized floats of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from boltlab.data.augment import Augment
from boltlab.data.base import DataModule, Split
from boltlab.data.decode import MAX_PIXELS, check_decode, read_pixels
from boltlab.data.loader import Batches, Made, TensorData
from boltlab.data.resize import centre, covering_size, crop_resize, fit, normalized, to_batch
from boltlab.data.samplers import Draws
from boltlab.ground.errors import DataError, UserError


def fit_images(images: Tensor, input_shape: tuple[int, int, int], resize: int | None = None) -> Tensor:
    """uint8 [N,C,H,W] of any size and 1 or 3 channels to `input_shape`; see `resize.fit`, whose geometry it has."""
    channels, height, width = input_shape
    size = covering_size((images.shape[2], images.shape[3]), (height, width), resize)
    if size != tuple(images.shape[2:]):
        # torchvision's resize takes floats where the CPU has no AVX, and other pixels come of it.
        scale = torch.ops.aten._upsample_bilinear2d_aa
        images = torch.cat([scale(part.contiguous(), list(size), False) for part in images.split(1024)])
    if size != (height, width):
        rows, columns = centre(size, (height, width))
        images = images[:, :, rows, columns].contiguous()
    return to_channels(images, channels)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 [N,C,H,W] with 1 or 3 channels to that many."""
    if images.shape[1] == channels:
        return images
    return images.expand(-1, channels, -1, -1).contiguous() if channels == 3 else F.rgb_to_grayscale(images)


class ImageBatches(Batches):
    """Batches uint8 [B,C,H,W] of `input_shape`, those for training augmented.

    The source holds images in memory (`TensorData`), or gives the pixels of one: `pixels(index) -> uint8 [H,W,C]`.
    """

    def __init__(
        self,
        source: Any,
        seed: int,
        input_shape: tuple[int, int, int],
        resize: int | None = None,
        augment: Augment | None = None,
        fastest: bool = False,
    ) -> None:
        super().__init__(source, seed)
        self.input_shape, self.resize, self.augment, self.fastest = input_shape, resize, augment, fastest
        self.resizes = augment is not None and augment.resizes
        self.one_by_one = None if augment is None else augment.one_by_one  # its part without a batch form
        if self.resizes and not hasattr(source, "pixels"):
            raise DataError(
                f"augment.crop=resized needs {type(source).__name__}.pixels(index) -> uint8 [H,W,C]; or augment=basic"
            )

    @property
    def note(self) -> str:
        if not self.one_by_one:
            return ""
        return f"{type(self.one_by_one).__name__} has no batch form: images are augmented one by one"

    @property
    def whole(self) -> bool:
        return isinstance(self.source, TensorData) and not self.resizes and not self.one_by_one

    @property
    def threads(self) -> bool:
        return hasattr(self.source, "pixels") and not self.one_by_one

    def make(self, epoch: int, indices: Tensor) -> Made:
        problems: list[str] = []
        x: Any
        if isinstance(self.source, TensorData) and not self.resizes:
            x, y = self.source.take(indices)
        elif hasattr(self.source, "pixels"):
            x, y, problems, indices = self._read(epoch, indices)
        else:
            x, y, problems, indices = self._one_by_one(epoch, indices)
        if self.augment is not None and x is not None:
            x = self.augment(x, Draws(self.seed, epoch, indices.to(x.device)))
        return x, y, problems

    def _read(self, epoch: int, indices: Tensor) -> tuple[Any, Any, list[str], Tensor]:
        """The samples that can be read, the messages of the others, and which of `indices` could be read."""
        channels, height, width = self.input_shape
        images = np.empty((len(indices), height, width, channels), np.uint8)
        boxes: Iterable[Any] = [None] * len(indices)
        if self.augment is not None and self.resizes:
            boxes = self.augment.boxes(Draws(self.seed, epoch, indices))
        kept: list[int] = []
        problems = []
        for index, numbers in zip(indices.tolist(), boxes, strict=True):
            try:
                pixels = self.source.pixels(index)
            except DataError as error:
                problems.append(str(error))  # as a value: raised in a worker it would carry a traceback as text
                continue
            out = images[len(kept)]
            if self.augment is not None and self.resizes:
                box = self.augment.box(numbers, *pixels.shape[:2])
                crop_resize(pixels, box, (height, width), self.fastest, out=out)
            else:
                fitted = getattr(self.source, "fitted", False)
                out[...] = pixels if fitted else fit(pixels, (height, width), self.resize, self.fastest)
            kept.append(index)
        read = torch.tensor(kept, dtype=torch.int64)
        if not kept:
            return None, None, problems, read
        return to_batch(images[: len(kept)]), self.source.labels[read], problems, read


@dataclass(kw_only=True, eq=False, repr=False)
class ImageDataModule(DataModule):
    """Base of the image data sets. A loader yields uint8 [B,C,H,W] and int64 [B].

    input_shape: (channels, height, width) that the model sees; images of another size are resized and cropped.
    mean, std: of the channels, pixels scaled to 0..1; a single value stands for all channels.
    augment: built from configs/augment; used on training batches only.
    allow_flip: a mirrored image keeps its class (not so for digits and letters); the augmentation obeys it.
    resize: length of the shorter side before evaluation's centre crop; None means that of the crop.
    decode: how image files are read. "fast" (simplejpeg) and "pillow" give the same pixels; "auto" is fast where its
        library is there. "fastest" scales with OpenCV, which does not antialias: photographs differ by 1.4 of 255.
    max_pixels: width times height of the largest image file that is read; a small file may claim any size.
    """

    input_shape: tuple[int, int, int] = (3, 224, 224)
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: Augment | None = None
    allow_flip: bool = True
    resize: int | None = None
    decode: Literal["auto", "pillow", "fast", "fastest"] = "auto"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        super().__post_init__()
        channels, height, width = self.input_shape
        self.input_shape = (channels, height, width)
        self._fitted_data: dict[Split, TensorData] = {}
        self._scale_and_shift: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = DataModule.check_arguments(arguments)
        try:
            check_decode(arguments.get("decode", "auto"))
        except UserError as error:
            problems.append(("decode", str(error)))
        problems += ImageDataModule._shape_problems(arguments)
        names, number = arguments.get("class_names"), arguments.get("num_classes")
        if isinstance(names, (list, tuple)) and isinstance(number, int) and len(names) != number:
            problems.append(("num_classes", f"{number}, but class_names lists {len(names)}"))
        std = arguments.get("std")
        if isinstance(std, (list, tuple)) and any(isinstance(s, (int, float)) and s <= 0 for s in std):
            problems.append(("std", f"{list(std)}: a standard deviation is above 0"))
        return problems

    @staticmethod
    def _shape_problems(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """What does not go together with a known `input_shape`."""
        shape, problems = arguments.get("input_shape"), []
        if not (isinstance(shape, (list, tuple)) and len(shape) == 3 and all(isinstance(n, int) for n in shape)):
            return []
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
        return problems

    def batches(self, split: Split, augment: bool) -> Batches:
        active = self.augment if augment and self.augment is not None and self.augment.active else None
        source = self.source(split, stored=active is not None and active.resizes)
        return ImageBatches(source, self.seed, self.input_shape, self.resize, active, self.decode == "fastest")

    def source(self, split: Split, stored: bool) -> Any:
        """Where batches come from: with `stored` images as large as they are stored, else as evaluation sees them."""
        data = self.dataset(split)
        if not isinstance(data, TensorData):
            return data
        if not stored:
            return self._fitted(split, data)
        x = to_channels(data.x, self.input_shape[0])
        return data if x is data.x else TensorData(x, data.labels)

    def _fitted(self, split: Split, data: TensorData) -> TensorData:
        """The split with every image at `input_shape`, made once."""
        if tuple(data.x.shape[1:]) == self.input_shape and self.resize is None:
            return data
        if split not in self._fitted_data:
            self._fitted_data[split] = TensorData(fit_images(data.x, self.input_shape, self.resize), data.labels)
        return self._fitted_data[split]

    def eval_pixels(self, path: str | Path) -> Tensor:
        """What evaluation makes of one image file: uint8 [C,H,W]."""
        channels, height, width = self.input_shape
        way = check_decode(self.decode)
        pixels = fit(read_pixels(path, channels, way, self.max_pixels), (height, width), self.resize, way == "fastest")
        return to_batch(pixels[None])[0]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B,C,H,W] to float32 of mean 0 and standard deviation 1 (by `mean` and `std`), on the same device."""
        return normalized(images, *self._channel_statistics(images.device))

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
