"""Augmentation of training images by whole batches; every file of configs/augment sets this one class.

What is drawn for an image follows (seed, epoch, index) alone (`samplers.Draws`), so the same image comes out on every
path: from memory, a file, or a cache that has not shrunk it, in any thread, process or batch, and, up to rounding in
what interpolates, on any device.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import pad

from boltlab.data.samplers import Draws, own_random_state, random_key

# Which of a sample's numbers (Draws) each operation takes: switching one on or off moves no other.
TOP, LEFT, FLIP, ANGLE, SHIFT, SCALE, SHEAR, COLOUR, CUTOUT, ERASE, RESIZED = 0, 1, 2, 3, 4, 6, 7, 10, 20, 22, 30
TRIES = 10
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and Pillow weigh


@dataclass(eq=False, repr=False)
class Augment:
    """Crop, flip, affine, policy, colour, cutout, erasing, in that order; each is off by default.

    input_shape: (C, H, W) of what comes out.
    allow_flip, flip_probability: mirrors left to right; `allow_flip=false` (digits, letters) switches it off.
    crop: "padded" pads each side by `padding` pixels ("auto": an eighth of the shorter side) and takes a random window
        of the input's size; "resized" takes a random part of the stored image (`min_area`..1 of its area, sides in
        ratio 3/4..4/3) and scales it to the input's size (Inception crop, arXiv:1409.4842).
    degrees, translate, zoom, shear: one affine map, bilinear: rotated by up to `degrees` either way, moved by up to
        the share `translate` of each side, scaled by a factor in 1-zoom..1+zoom, sheared by up to `shear` degrees.
    brightness, contrast, saturation: factors in 1-x..1+x; hue: turned by up to `hue` (0..0.5) of the circle, at
        constant luma (YIQ). One colour matrix an image, clipped once.
    policy: "randaugment" (arXiv:1909.13719; `num_ops` operations of strength `magnitude`, 0..30) or "trivialaugment"
        (arXiv:2103.10158; one operation of random strength). They are torchvision's and have no batch form: images are
        changed one by one, in worker processes.
    cutout: side in pixels of a square that is painted over, its centre anywhere in the image (arXiv:1708.04552).
    erase_probability: of painting over a rectangle of 2 to 33 % of the area (random erasing, arXiv:1708.04896).
    fill: grey value 0..255 of what the operations uncover or paint over.
    """

    input_shape: tuple[int, int, int]
    allow_flip: bool = True
    flip_probability: float = 0.0
    crop: Literal["none", "padded", "resized"] = "none"
    padding: int | Literal["auto"] = "auto"
    padding_mode: Literal["constant", "reflect", "edge", "symmetric"] = "constant"
    min_area: float = 0.08
    degrees: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    num_ops: int = 2
    magnitude: int = 9
    cutout: int = 0
    erase_probability: float = 0.0
    fill: int = 0

    def __post_init__(self) -> None:
        _, self.height, self.width = self.input_shape
        if not self.allow_flip:
            self.flip_probability = 0.0
        side = min(self.height, self.width)
        padding = round(side / 8) if self.padding == "auto" else self.padding
        self.pad = padding if self.crop == "padded" else 0
        self.resizes = self.crop == "resized"  # takes the stored image, before it is fitted to the input's size
        self.affine = any((self.degrees, self.translate, self.zoom, self.shear))
        self.colour = any((self.brightness, self.contrast, self.saturation, self.hue))
        self.one_by_one = self._policy()
        steps = (self.resizes, self.pad, self.flip_probability, self.affine, self.colour, self.one_by_one)
        self.active = any((*steps, self.cutout, self.erase_probability))

    def _policy(self) -> Callable[[Tensor], Tensor] | None:
        """What changes one image, uint8 [C,H,W]."""
        if self.policy == "none":
            return None
        from torchvision.transforms import InterpolationMode, v2

        options: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": self.fill}
        if self.policy == "randaugment":
            return v2.RandAugment(self.num_ops, self.magnitude, **options)
        return v2.TrivialAugmentWide(**options)

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = []
        ranges = {"flip_probability": (0, 1), "min_area": (0, 1), "degrees": (0, 180), "fill": (0, 255),
                  "magnitude": (0, 30), "padding": (0, 10_000), "num_ops": (1, 100), "translate": (0, 1),
                  "zoom": (0, 0.99), "shear": (0, 89), "brightness": (0, 1), "contrast": (0, 1), "saturation": (0, 1),
                  "hue": (0, 0.5), "cutout": (0, 10_000), "erase_probability": (0, 1)}  # fmt: skip
        for name, (low, high) in ranges.items():
            value = arguments.get(name)
            if isinstance(value, (int, float)) and not low <= value <= high:
                problems.append((name, f"{value} is outside {low}..{high}"))
        shape, padding = arguments.get("input_shape"), arguments.get("padding")
        if isinstance(shape, (list, tuple)) and isinstance(padding, int) and arguments.get("crop") == "padded":
            most = min(shape[-2:]) - (arguments.get("padding_mode") == "reflect")
            if arguments.get("padding_mode") in ("reflect", "symmetric") and padding > most:
                problems.append(("padding", f"{padding} is more than the {most} pixels that can be mirrored"))
        return problems

    def boxes(self, draws: Draws) -> list[list[float]]:
        """The numbers that `box` takes, one list for each sample."""
        rows: list[list[float]] = draws.uniforms(RESIZED, 2 * TRIES + 2).tolist()
        return rows

    def box(self, numbers: list[float], height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part of an image of that size that is scaled to the input's size.

        As torchvision's RandomResizedCrop draws it: ten tries, then the largest part in the centre whose sides are in
        ratio 3/4..4/3.
        """
        low, high = math.log(3 / 4), math.log(4 / 3)
        for attempt in range(TRIES):
            area = height * width * (self.min_area + (1 - self.min_area) * numbers[2 * attempt])
            ratio = math.exp(low + (high - low) * numbers[2 * attempt + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = numbers[2 * TRIES], numbers[2 * TRIES + 1]
                return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
        w, h = width, height
        if width / height < 3 / 4:
            h = round(w / (3 / 4))
        elif width / height > 4 / 3:
            w = round(h * (4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B,C,H,W] of the input's size to the same; `images` itself may be changed."""
        if self.pad or self.flip_probability:
            top, left, flip = draws.uniforms(TOP, 3).unbind(1)
        if self.pad:
            choices = 2 * self.pad + 1
            windows = _windows_by_index
            if images.device.type == "cpu":
                windows = _shifted if self.padding_mode == "constant" else _windows_of_numpy
            corner = ((top * choices).long(), (left * choices).long())
            images = windows(images, *corner, self.pad, self.padding_mode, self.fill)
        if self.flip_probability:
            images = _flip(images, flip < self.flip_probability)
        if self.affine:
            images = self._affine(images, draws)
        if self.one_by_one is not None:
            images = _one_by_one(self.one_by_one, images, draws)
        if self.colour:
            images = self._colour(images, draws)
        if self.cutout:
            images = self._cutout(images, draws)
        if self.erase_probability:
            images = self._erase(images, draws)
        return images

    def _affine(self, images: Tensor, draws: Draws) -> Tensor:
        numbers = 2 * draws.uniforms(ANGLE, SHEAR + 1 - ANGLE) - 1  # -1..1: angle, two shifts, scale, shear
        angle = numbers[:, 0] * math.radians(self.degrees)
        shear = torch.tan(numbers[:, SHEAR - ANGLE] * math.radians(self.shear))
        scale = 1 + numbers[:, SCALE - ANGLE] * self.zoom
        shift = numbers[:, SHIFT - ANGLE : SHIFT - ANGLE + 2] * self.translate * 2  # the grid's sides are 2 long
        cos, sin, ratio = angle.cos() / scale, angle.sin() / scale, self.height / self.width
        # Where in the source a place of the result comes from, as torchvision composes it, around the centre.
        rows = torch.stack([cos - shear * sin, ratio * (sin + shear * cos), -sin / ratio, cos], dim=1).view(-1, 2, 2)
        theta = torch.cat([rows, -(rows @ shift.unsqueeze(2))], dim=2)
        grid = F.affine_grid(theta, [len(images), 1, self.height, self.width], align_corners=False)
        moved = F.grid_sample(images.float() - self.fill, grid, mode="bilinear", align_corners=False)
        return (moved + self.fill).round_().clamp_(0, 255).byte()

    def _colour(self, images: Tensor, draws: Draws) -> Tensor:
        numbers = 2 * draws.uniforms(COLOUR, 4) - 1
        limits = torch.tensor([self.brightness, self.contrast, self.saturation], device=images.device)
        bright, contrast, saturation = (1 + numbers[:, :3] * limits).unbind(1)
        pixels = images.flatten(2).float()
        means = pixels.mean(2)  # [B, C]
        gain = bright * contrast
        if images.shape[1] == 1:
            shift = (1 - contrast) * bright * means[:, 0]
            mixed = pixels * gain.view(-1, 1, 1) + shift.view(-1, 1, 1)
        else:
            grey = torch.tensor(GREY, device=images.device)
            turn = numbers[:, 3] * self.hue * 2 * math.pi
            colours = gain.view(-1, 1, 1) * _saturate_and_turn(saturation, turn)
            shift = (1 - contrast) * bright * (means @ grey)  # contrast is about the image's mean grey
            mixed = torch.baddbmm(shift.view(-1, 1, 1), colours, pixels)
        return mixed.round_().clamp_(0, 255).byte().view_as(images)

    def _cutout(self, images: Tensor, draws: Draws) -> Tensor:
        centre_y = (draws.uniform(CUTOUT) * self.height).long()
        centre_x = (draws.uniform(CUTOUT + 1) * self.width).long()
        top, left = centre_y - self.cutout // 2, centre_x - self.cutout // 2
        side = torch.full_like(top, self.cutout)
        return self._paint(images, top, left, side, side)

    def _erase(self, images: Tensor, draws: Draws) -> Tensor:
        chance, area, ratio, top, left = draws.uniforms(ERASE, 5).unbind(1)
        pixels = (0.02 + 0.31 * area) * self.height * self.width
        ratio = torch.exp(math.log(0.3) + ratio * (math.log(3.3) - math.log(0.3)))
        height = (pixels * ratio).sqrt().round().clamp(max=self.height - 1)
        width = (pixels / ratio).sqrt().round().clamp(max=self.width - 1)
        height = torch.where(chance < self.erase_probability, height, 0)  # no pixel of the others
        top, left = (top * (self.height - height + 1)).floor(), (left * (self.width - width + 1)).floor()
        return self._paint(images, top, left, height, width)

    def _paint(self, images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
        rows = torch.arange(self.height, device=images.device) - top.unsqueeze(1)
        columns = torch.arange(self.width, device=images.device) - left.unsqueeze(1)
        rows = (rows >= 0) & (rows < height.unsqueeze(1))
        columns = (columns >= 0) & (columns < width.unsqueeze(1))
        return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), self.fill)


def _one_by_one(policy: Callable[[Tensor], Tensor], images: Tensor, draws: Draws) -> Tensor:
    changed = []
    with own_random_state() as seed_random_state:
        for image, index in zip(images, draws.indices.tolist(), strict=True):
            seed_random_state(random_key(draws.seed, draws.epoch, index))
            changed.append(policy(image))
    return torch.stack(changed)


def _flip(images: Tensor, mask: Tensor) -> Tensor:
    if images.device.type != "cpu":  # a mask as an index would wait for the device
        return torch.where(mask.view(-1, 1, 1, 1), images.flip(-1), images)
    # numpy copies whole images fast, torch turns them fast.
    pixels, chosen = images.numpy(), mask.nonzero()[:, 0].numpy()
    pixels[chosen] = torch.from_numpy(pixels[chosen]).flip(-1).numpy()
    return images


_reused = threading.local()


def _shifted(images: Tensor, top: Tensor, left: Tensor, padding: int, mode: str, fill: int) -> Tensor:
    """The window of the padded image whose corner is at (top, left), three times as fast as by a window of rows.

    Between rows of fill above and below it, an image is moved as one run of bytes, whole planes at a time. What comes
    round the sides that way is painted over.
    """
    batch, channels, height, width = images.shape
    key = (*images.shape, padding, fill)
    if getattr(_reused, "key", None) != key:  # new memory and its fill would take as long as the rest
        size = (height + 2 * padding) * width + 2 * padding
        sides = np.arange(width) + np.arange(-padding, padding + 1)[:, None]  # column of the source, for every `left`
        inside = np.tile((sides >= 0) & (sides < width), height)[:, None] * np.uint8(255)
        _reused.key, _reused.planes = key, np.full((batch, channels, size), fill, np.uint8)
        _reused.inside, _reused.outside = inside, ~inside & np.uint8(fill)
    planes, start = _reused.planes, padding * (width + 1)
    planes[:, :, start : start + height * width] = images.numpy().reshape(batch, channels, -1)
    strides = (planes.strides[0], 1, planes.strides[1], 1)
    shape = (batch, 2 * start + 1, channels, height * width)
    runs = np.lib.stride_tricks.as_strided(planes, shape, strides)
    columns = left.numpy()
    moved = runs[np.arange(batch), top.numpy() * width + columns]
    moved &= _reused.inside[columns]
    if fill:
        moved |= _reused.outside[columns]
    return torch.from_numpy(moved).view(images.shape)


def _windows_of_numpy(images: Tensor, top: Tensor, left: Tensor, padding: int, mode: str, fill: int) -> Tensor:
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(images.numpy(), sides, mode)  # type: ignore[call-overload]
    every = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    return torch.from_numpy(every[np.arange(len(images)), :, top.numpy(), left.numpy()])


def _windows_by_index(images: Tensor, top: Tensor, left: Tensor, padding: int, mode: str, fill: int) -> Tensor:
    """The same pixels, by an index for each of them: quick on accelerators, slow on CPUs."""
    batch, channel, rows, columns = (torch.arange(size, device=images.device) for size in images.shape)
    rows, columns = rows + top[:, None], columns + left[:, None]
    padded = pad(images, [padding], fill, mode)
    return padded[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


# RGB to YIQ, whose first row is GREY and whose other two span the colour plane.
_YIQ = torch.tensor([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_RGB = torch.linalg.inv(_YIQ)


def _saturate_and_turn(saturation: Tensor, turn: Tensor) -> Tensor:
    """[B,3,3]: RGB to YIQ, the colour plane scaled and turned, and back."""
    cos, sin = saturation * turn.cos(), saturation * turn.sin()
    one, none = torch.ones_like(turn), torch.zeros_like(turn)
    plane = torch.stack([one, none, none, none, cos, -sin, none, sin, cos], dim=1).view(-1, 3, 3)
    return _RGB.to(turn.device) @ plane @ _YIQ.to(turn.device)
