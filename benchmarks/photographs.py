"""Photographs from class folders to normalized batches [64,3,224,224], against torchvision's and timm's loaders.

    python benchmarks/photographs.py FOLDER    # FOLDER/<class>/<image>, some hundred photographs

Every way draws a random resized crop and a flip and ends in normalized float32. "One core" is one CPU for the process,
no worker and no thread beside the one that decodes, and processor seconds; "two cores" is two worker processes against
two threads, by the wall clock.
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, in_turns, machine, show
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import boltlab.data.image_folder as boltlab_folder
from boltlab.data.augment import Augment
from boltlab.data.cache import ImageCache
from boltlab.data.decode import check_decode, read_pixels
from boltlab.data.resize import crop_resize
from boltlab.data.samplers import Draws
from boltlab.ground.malloc import keep_freed_memory

SIZE, BATCH = 224, 64
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FFCV_RAW = 1700  # images a second and core, FFCV's raw format at 256 pixels, measured elsewhere: it did not build here


class Ours:
    """boltlab's own loader; every pass is an epoch."""

    def __init__(self, folder: str, num_workers: int, passes: int = 1, normalized: bool = True, **options: Any) -> None:
        augment = Augment(input_shape=(3, SIZE, SIZE), crop="resized", flip_probability=0.5)
        self.data = boltlab_folder.ImageFolder(
            root=folder, augment=augment, batch_size=BATCH, num_workers=num_workers, val_fraction=1, test_fraction=1,
            mean=MEAN, std=STD, **options,
        )  # fmt: skip
        self.loader, self.passes, self.normalized = self.data.train_dataloader(), passes, normalized
        self.number = passes * len(self.data.dataset("train"))

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.passes):
            for batch in self.loader:
                yield self.data.on_after_batch_transfer(batch, 0) if self.normalized else batch


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
    """Images a second of one pass: of processor time on one CPU, by the wall clock on several."""
    clock = time.process_time if len(cpus) == 1 else time.perf_counter

    def one_pass() -> float:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            start = clock()
            for _ in batches() if callable(batches) else batches:
                pass
            return getattr(batches, "number", number) / (clock() - start)
        finally:
            os.sched_setaffinity(0, before)

    return one_pass


def difference(files: list[str], decode: str) -> tuple[float, float]:
    """Mean and maximum absolute difference of crops from Pillow's resized_crop, in 255ths."""
    augment, means, worst = Augment(input_shape=(3, SIZE, SIZE), crop="resized"), [], 0.0
    numbers = augment.boxes(Draws(0, 0, torch.arange(len(files))))
    for file, drawn in zip(files, numbers, strict=True):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        box = augment.box(drawn, image.height, image.width)
        reference = v2.functional.resized_crop(image, *box, [SIZE, SIZE], antialias=True)
        pixels = crop_resize(read_pixels(file, 3, decode), box, (SIZE, SIZE), decode == "fastest")  # type: ignore[arg-type]
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
    keep_freed_memory()
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

        disk = {"cache": "disk", "cache_size": 256, "cache_dir": cache_folder}
        one = {cpus[0]}
        ways: dict[str, Any] = {
            "torchvision": torchvision_loader(folder, 0),
            "timm": timm_loader(folder),
            "decode alone, Pillow": lambda: (np.asarray(Image.open(file).convert("RGB")) for file in files),
            "decode alone": lambda: (read_pixels(file, 3, "fast") for file in files),
            "pillow": Ours(folder, 0, decode="pillow"),
            "fast": Ours(folder, 0, decode="fast"),
            "fastest": Ours(folder, 0, decode="fastest"),
            "JPEG cache": Ours(folder, 0, cache_format="jpeg", **disk),
            "memory map": Ours(folder, 0, **disk),
            "memory map, fastest": Ours(folder, 0, decode="fastest", **disk),
            "memory map, uint8": Ours(folder, 0, normalized=False, **disk),
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
                "fast": Ours(folder, 2, repeats, decode="fast"),
                "fastest": Ours(folder, 2, repeats, decode="fastest"),
                "JPEG cache": Ours(folder, 2, repeats, cache_format="jpeg", **disk),
                "memory map": Ours(folder, 2, repeats, **disk),
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
