"""Pictures of a data set, as the model gets them."""

import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from boltlab.data.base import DataModule, Split
from boltlab.data.images import ImageDataModule

# Tried in this order for class names that the first one cannot write.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS")


def draw_grid(
    data: ImageDataModule,
    path: str | Path,
    split: Split = "train",
    count: int = 32,
    columns: int = 8,
    epoch: int = 0,
) -> Path:
    """Write a PNG of `count` images spread evenly over the split, each under its class name.

    The images go the whole way: augmented as in training epoch number `epoch` (train only), normalized, and back to
    0..255.
    """
    number = len(data.batches(split, augment=split == "train"))  # a cache in memory leaves out what is unreadable
    indices = torch.linspace(0, number - 1, min(count, number)).round().long().unique().tolist()
    pixels, labels = pixels_of(data, split, indices, augment=split == "train", epoch=epoch)
    names = data.class_names if isinstance(data.class_names, list) else [str(n) for n in range(int(labels.max()) + 1)]
    return draw_images(pixels, [(names[label],) for label in labels.tolist()], path, columns)


def pixels_of(
    data: ImageDataModule, split: Split, indices: list[int], augment: bool = False, epoch: int = 0
) -> tuple[np.ndarray, Tensor]:
    """What the model sees of these samples, uint8 [N,H,W,C], and their labels [N].

    Raises:
        DataError: one of them cannot be read.
    """
    images, labels = data.samples(split, indices, augment=augment, epoch=epoch)
    pixels: np.ndarray = data.denormalize(data.normalize(images)).permute(0, 2, 3, 1).numpy()
    return pixels, labels


def draw_images(pixels: np.ndarray, titles: list[tuple[str, ...]], path: str | Path, columns: int = 8) -> Path:
    """Write a PNG of images uint8 [N,H,W,C], each under the lines of its title."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in FONTS if font in installed]
    columns = min(columns, len(pixels))
    rows, lines = -(-len(pixels) // columns), max(map(len, titles))
    figure = Figure(figsize=(1.6 * columns, (1.65 + 0.2 * lines) * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, image, title in zip(panels, pixels, titles, strict=False):
        text = "\n".join(line if len(line) <= 18 else f"{line[:17]}…" for line in title)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(text, fontsize=9, family=fonts, parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font here has it: an empty box stands for it
        figure.savefig(path, format="png")
    return path


def count_classes(data: DataModule) -> dict[Split, Tensor]:
    """Samples of each class in every split, int64 [num_classes]."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    return {split: data.class_counts(split) for split in splits}
