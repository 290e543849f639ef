"""Photographs from class folders to normalized batches [64,3,224,224], against torchvision's and timm's loaders.

    python benchmarks/photographs.py FOLDER    # FOLDER/<class>/<image>, some hundred photographs

Every way draws a random resized crop and a flip and ends in normalized float32. "One core" is one CPU for the process,
no worker and no thread beside the one that decodes; "two cores" is two worker processes against two threads.
"""

import os
import random
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, in_turns, machine, show
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from boltlab.data.cache import ImageCache
from boltlab.data.decode import check_decode, read_pixels
from boltlab.data.resize import crop_resize, normalize_into, to_batch

SIZE, BATCH = 224, 64
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SCALE = (1 / (255 * torch.tensor(STD))).view(3, 1, 1)
SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)
FFCV_RAW = 1700  # images a second and core, FFCV's raw format at 256 pixels, measured elsewhere: it did not build here


def crop_box(draw: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area, ratio = height * width * draw.uniform(0.08, 1), np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


class Ours:
    """The building blocks of boltlab's loader in the smallest loop: threads fill batches, the caller normalizes."""

    def __init__(
        self, read: Callable[[int], np.ndarray], number: int, fastest: bool, threads: int = 0, nchw: bool = False
    ) -> None:
        self.read, self.number, self.fastest, self.nchw = read, number, fastest, nchw
        self.pool = ThreadPoolExecutor(threads) if threads else None
        self.ahead = 2 * threads
        self.normalized = torch.empty(BATCH, 3, SIZE, SIZE)
        if not nchw:
            self.normalized = self.normalized.to(memory_format=torch.channels_last)
        self.free = [np.empty((BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(self.ahead + 2)]
        self.epoch = 0

    def batch(self, images: np.ndarray, indices: list[int], draw: random.Random) -> torch.Tensor:
        for image, i in zip(images, indices, strict=True):
            pixels = self.read(i)
            box = crop_box(draw, *pixels.shape[:2])
            crop_resize(pixels, box, (SIZE, SIZE), self.fastest, draw.random() < 0.5, image)
        return to_batch(images, channels_last=not self.nchw)

    def uint8(self) -> Iterator[torch.Tensor]:
        self.epoch += 1
        order = random.Random(self.epoch).sample(range(self.number), self.number)
        work = [(order[at : at + BATCH], random.Random(at + self.epoch)) for at in range(0, self.number, BATCH)]
        if self.pool is None:
            for indices, draw in work:
                yield self.batch(self.free[0][: len(indices)], indices, draw)
            return
        waiting: deque[tuple[np.ndarray, Future[torch.Tensor]]] = deque()
        while work or waiting:
            while work and len(waiting) <= self.ahead:
                images, (indices, draw) = self.free.pop(), work.pop(0)
                waiting.append((images, self.pool.submit(self.batch, images[: len(indices)], indices, draw)))
            images, batch = waiting.popleft()
            yield batch.result()
            self.free.append(images)  # the caller is done with it

    def __iter__(self) -> Iterator[torch.Tensor]:
        for images in self.uint8():
            yield normalize_into(images, SCALE, SHIFT, self.normalized[: len(images)])


def torchvision_loader(folder: str, num_workers: int, repeats: int = 1) -> Any:
    crop_flip = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    data = torch.utils.data.ConcatDataset([ImageFolder(folder, v2.Compose([*crop_flip, *to_float]))] * repeats)
    return DataLoader(data, BATCH, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0)


def timm_loader(folder: str) -> Any:
    import timm.data

    return timm.data.create_loader(
        ImageFolder(folder),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        color_jitter=None,
        interpolation="bilinear",
        mean=tuple(MEAN),
        std=tuple(STD),
    )


def rate(batches: Any, number: int, cpus: set[int]) -> Callable[[], float]:
    """Images a second of one pass, on these CPUs."""

    def one_pass() -> float:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            start = time.perf_counter()
            for _ in batches() if callable(batches) else batches:
                pass
            return number / (time.perf_counter() - start)
        finally:
            os.sched_setaffinity(0, before)

    return one_pass


def difference(files: list[str], decode: str) -> tuple[float, float]:
    """Mean and maximum absolute difference of crops from Pillow's resized_crop, in 255ths."""
    draw, means, worst = random.Random(0), [], 0.0
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        top, left, height, width = crop_box(draw, image.height, image.width)
        reference = v2.functional.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
        pixels = crop_resize(
            read_pixels(file, 3, decode),  # type: ignore[arg-type]
            (top, left, height, width),
            (SIZE, SIZE),
            decode == "fastest",
        )
        away = np.abs(pixels.astype(int) - np.asarray(reference))
        means.append(float(away.mean()))
        worst = max(worst, float(away.max()))
    return float(np.mean(means)), worst


def main() -> None:
    folder = sys.argv[1]
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    files = [path for path, _ in ImageFolder(folder).samples]
    number = len(files)
    torch.set_num_threads(1)
    check_decode("fastest")
    cpus = sorted(os.sched_getaffinity(0))
    print(machine("torch", "torchvision", "timm", "pillow", "simplejpeg", "opencv-python-headless"))

    with tempfile.TemporaryDirectory() as cache_folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = time.perf_counter()
        raw = ImageCache.open(files, 3, 256, "raw", cache_folder, "fast", progress=False)
        seconds = time.perf_counter() - seconds
        jpeg = ImageCache.open(files, 3, 256, "jpeg", cache_folder, "fast", progress=False)
        sizes = [sum(Path(file).stat().st_size for file in files), jpeg.images.nbytes, raw.images.nbytes]
        print(
            f"{number} files {sizes[0] / 1e6:.1f} MB, JPEG cache {sizes[1] / 1e6:.1f} MB, raw {sizes[2] / 1e6:.1f} MB"
        )
        print(f"building the raw cache, {len(cpus)} cores: {number / seconds:.0f} images a second")

        def reader(decode: str) -> Callable[[int], np.ndarray]:
            return lambda i: read_pixels(files[i], 3, decode)  # type: ignore[arg-type]

        one = {cpus[0]}
        ways: dict[str, Any] = {
            "torchvision": torchvision_loader(folder, 0),
            "timm": timm_loader(folder),
            "decode alone, Pillow": lambda: (np.asarray(Image.open(file).convert("RGB")) for file in files),
            "decode alone": lambda: (read_pixels(file, 3, "fast") for file in files),
            "pillow": Ours(reader("pillow"), number, fastest=False),
            "fast": Ours(reader("fast"), number, fastest=False),
            "fastest": Ours(reader("fastest"), number, fastest=True),
            "JPEG cache": Ours(jpeg.__getitem__, number, fastest=False),
            "memory map": Ours(raw.__getitem__, number, fastest=False),
            "memory map, fastest": Ours(raw.__getitem__, number, fastest=True),
            "memory map, NCHW": Ours(raw.__getitem__, number, fastest=False, nchw=True),
            "memory map, uint8": Ours(raw.__getitem__, number, fastest=False).uint8,
        }
        measured = in_turns({name: rate(way, number, one) for name, way in ways.items()}, rounds)
        peer = measured["torchvision"]
        goals = {
            "fast": "at least 1.6",
            "fastest": "at least 2.0",
            "JPEG cache": "at least 4.5",
            "memory map": "at least 14",
        }
        rows = [
            Row(f"{n}, against torchvision", v, peer, goals.get(n, "")) for n, v in measured.items() if v is not peer
        ]
        rows.append(Row("fast, against decode alone", measured["fast"], measured["decode alone"], "at least 0.65"))
        rows.append(Row("fast, against timm", measured["fast"], measured["timm"]))
        rows.append(Row("memory map, against FFCV raw", measured["memory map"], [FFCV_RAW] * rounds, "at least 2"))
        show("One core", "images/s", rows)

        if len(cpus) > 1:
            repeats, two = 4, set(cpus[:2])
            workers = torchvision_loader(folder, 2, repeats)
            many = number * repeats
            both: dict[str, Any] = {
                "torchvision": workers,
                "fast": Ours(lambda i: reader("fast")(i % number), many, fastest=False, threads=2),
                "fastest": Ours(lambda i: reader("fastest")(i % number), many, fastest=True, threads=2),
                "JPEG cache": Ours(lambda i: jpeg[i % number], many, fastest=False, threads=2),
                "memory map": Ours(lambda i: raw[i % number], many, fastest=False, threads=2),
            }
            rate(workers, many, two)()  # starts the workers
            measured = in_turns({name: rate(way, many, two) for name, way in both.items()}, max(2, rounds // 2))
            peer = measured.pop("torchvision")
            goals = {"fast": "at least 2.5"}
            rows = [Row(f"{name}, two threads", values, peer, goals.get(name, "")) for name, values in measured.items()]
            show("Two cores, wall clock, against a DataLoader with two workers", "images/s", rows)

    print(
        "\n### Difference from Pillow's antialiased crop, of 255\n\n| decode | mean | maximum |\n| --- | ---: | ---: |"
    )
    for decode in ("pillow", "fast", "fastest"):
        mean, worst = difference(files, decode)
        print(f"| {decode} | {mean:.3f} | {worst:.0f} |")


if __name__ == "__main__":
    main()
