"""Images in memory to normalized training batches, against torchvision's dataset, PIL and transforms.v2.

    python benchmarks/memory.py

One core: the process is bound to one CPU, no workers; processor seconds count, so that other work on the machine does
not. Random pixels: what they show costs nothing.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Row, in_turns, machine, show
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from boltlab.data.augment import Augment
from boltlab.data.base import Split
from boltlab.data.images import ImageDataModule
from boltlab.data.loader import TensorData
from boltlab.ground.malloc import keep_freed_memory

COUNT, PEER_COUNT = 20_000, 1_500
CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


@dataclass(kw_only=True, eq=False, repr=False)
class Noise(ImageDataModule):
    """As many images of noise as an epoch here has."""

    def load(self, split: Split) -> TensorData:
        x = torch.randint(0, 256, (COUNT, *self.input_shape), dtype=torch.uint8)
        return TensorData(x, torch.randint(0, 10, (COUNT,)))


class Torchvision(Dataset[Any]):
    """What torchvision's CIFAR10 and MNIST do: an array in memory, an image by PIL, its transform."""

    def __init__(self, shape: tuple[int, int, int], transform: v2.Transform) -> None:
        channels, height, width = shape
        pixels = torch.randint(0, 256, (PEER_COUNT, height, width, channels), dtype=torch.uint8).numpy()
        self.pixels, self.transform = pixels.squeeze(-1) if channels == 1 else pixels, transform

    def __len__(self) -> int:
        return PEER_COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def speed(batches: Iterable[Any], finish: Callable[[Any], Any] = lambda batch: batch) -> float:
    """Samples a second of processor time."""
    count, start = 0, time.process_time()
    for batch in batches:
        count += len(finish(batch)[0])
    return count / (time.process_time() - start)


def ours(shape: tuple[int, int, int], batch_size: int, normalized: bool = True, **augment: Any) -> Callable[[], float]:
    channels = shape[0]
    data = Noise(
        input_shape=shape,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        batch_size=batch_size,
        augment=Augment(input_shape=shape, **augment),
    )
    loader = data.train_dataloader()

    def normalize(batch: Any) -> Any:
        return data.on_after_batch_transfer(batch, 0)

    return partial(speed, loader, normalize) if normalized else partial(speed, loader)


def torchvision(shape: tuple[int, int, int], batch_size: int, crop_and_flip: bool) -> Callable[[], float]:
    steps = [v2.RandomCrop(shape[1:], padding=4), v2.RandomHorizontalFlip()] if crop_and_flip else []
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * shape[0], [0.25] * shape[0])]
    loader: DataLoader[Any] = DataLoader(Torchvision(shape, v2.Compose(steps)), batch_size, shuffle=True)
    return lambda: speed(loader)


def index_select(shape: tuple[int, int, int], batch_size: int) -> Callable[[], float]:
    x = torch.randint(0, 256, (COUNT, *shape), dtype=torch.uint8)

    def run() -> float:
        order = torch.randperm(COUNT)
        start = time.process_time()
        for indices in order.split(batch_size):
            x.index_select(0, indices)
        return COUNT / (time.process_time() - start)

    return run


def main() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    keep_freed_memory()
    print(machine("torch", "torchvision", "pillow"))
    crop_and_flip = {"crop": "padded", "padding": 4, "flip_probability": 0.5}
    cases: dict[str, tuple[Callable[[], float], Callable[[], float], str]] = {}
    for size in (64, 512):
        cases[f"CIFAR size, crop, flip, normalize, batches of {size}"] = (
            ours(CIFAR, size, **crop_and_flip), torchvision(CIFAR, size, True), "at least 100")  # fmt: skip
        cases[f"CIFAR size, crop, flip, as uint8 (what a GPU is given), batches of {size}; peer normalizes"] = (
            ours(CIFAR, size, normalized=False, **crop_and_flip), torchvision(CIFAR, size, True), "")  # fmt: skip
        cases[f"MNIST size, normalize, batches of {size}"] = (
            ours(MNIST, size), torchvision(MNIST, size, False), "at least 150")  # fmt: skip
        cases[f"CIFAR size, uint8, no augmentation, batches of {size}; peer: index_select"] = (
            ours(CIFAR, size, normalized=False), index_select(CIFAR, size), "at least 0.6")  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "rotation by up to 10 degrees": {"degrees": 10},
        "colour jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        "cutout": {"cutout": 8},
        "random erasing": {"erase_probability": 0.5},
    }
    peers = {
        "rotation by up to 10 degrees": v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
        "colour jitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "cutout": v2.Identity(),
        "random erasing": v2.Compose([v2.PILToTensor(), v2.RandomErasing(0.5)]),
    }
    for name, options in more.items():
        steps = [peers[name], v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
        loader: DataLoader[Any] = DataLoader(Torchvision(CIFAR, v2.Compose(steps)), 512, shuffle=True)
        peer = partial(speed, loader)
        if name == "cutout":
            name = "cutout (peer: without it, torchvision has none)"
        cases[f"CIFAR size, {name}, normalize"] = (ours(CIFAR, 512, **options), peer, "")
    flat = {f"{side} {name}": case[i] for name, case in cases.items() for i, side in enumerate(("ours", "peer"))}
    measured = in_turns(flat)
    rows = [Row(name, measured[f"ours {name}"], measured[f"peer {name}"], goal) for name, (_, _, goal) in cases.items()]
    show("Images in memory, one core", "images/s", rows)


if __name__ == "__main__":
    main()
