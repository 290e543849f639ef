"""Folders of images, one folder a class: `root/train/<class>/…` with val and test beside train, or `root/<class>/…`."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from boltlab.data.base import Split
from boltlab.data.decode import MAX_PIXELS, Decode, check_decode, read_image, read_pixels
from boltlab.data.images import ImageBatches, ImageDataModule
from boltlab.data.layout import (
    EXTENSIONS,
    folders,
    no_folds,
    refuse_other_level,
    split_of,
    splits_by_name,
    without_classes,
)
from boltlab.data.loader import Loader, TensorData, available_cores
from boltlab.data.many_files import in_order, progress_bar
from boltlab.data.memory import fits_in_memory, refuse_without_room
from boltlab.data.resize import to_batch
from boltlab.data.samplers import EvalSampler
from boltlab.data.splits import listed
from boltlab.ground.errors import DataError


@dataclass(eq=False, repr=False)
class FolderData(Dataset[Any]):
    """Files decoded as they are asked for, or as a cache holds them."""

    files: list[str]
    labels: Tensor
    class_names: list[str]
    channels: int
    decode: Decode
    cache: Any = None  # an ImageCache of them
    fitted: bool = False  # whether the cache holds what evaluation sees
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> np.ndarray:
        """One image, uint8 [H,W,C] as large as it is stored; DataError names the file and its class."""
        try:
            if self.cache is not None:
                return self.cache[index]
            return read_pixels(self.files[index], self.channels, self.decode, self.max_pixels)
        except DataError as error:
            raise DataError(f"{error} (class {self.class_names[int(self.labels[index])]!r})") from error

    def subset(self, indices: Tensor) -> "FolderData":
        return replace(self, files=[self.files[i] for i in indices.tolist()], labels=self.labels[indices])


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFolder(ImageDataModule):
    """Images from disk, uint8 [B,C,H,W]. Labels are the class folders of `train` in sorted order, in every split.

    root: holds `train` (and `val`, `test`), each with one folder a class; or the class folders themselves.
    Without `val`, `val_fraction` of train is set aside, stratified. Without `test`, the test split is val (as it is
    custom for ImageNet) and a warning says so. Class folders straight in root are split by `val_fraction` and
    `test_fraction`. `folds` need a root without `val`.
    class_names: "auto" takes the folders' names when the config is resolved; a list must name exactly the folders.
    max_bad_files: so many unreadable files of a split are skipped and listed instead of ending the run.
    cache: "memory" decodes each split once, when it is first used, by all cores; batches are then made as those of
        MNIST and CIFAR, on the GPU where they fit. Each process keeps the whole. Unreadable files are left out at once,
        so those behind them take other places in the order. "disk" keeps decoded images below `cache_dir`, for later
        runs and for all processes of the machine; other files or another split make another cache. Both hold
        what evaluation sees, pixel by pixel; only where the augmentation takes parts of the stored image
        (augment.crop=resized), training images are kept whole, shrunk to `cache_size`.
    cache_size: shorter side in pixels; None is what leaves evaluation its `resize`, or 8/7 of the input (256 for 224).
    cache_format: on disk, raw pixels, or JPEG files (quality 90) of a tenth of that size.
    """

    root: str
    mean: list[float] | None = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] | None = field(default_factory=lambda: [0.229, 0.224, 0.225])
    test_fraction: float | int = 0.1
    max_bad_files: int = 0
    cache: Literal["none", "memory", "disk"] = "none"
    cache_size: int | None = None
    cache_format: Literal["raw", "jpeg"] = "raw"
    cache_dir: str = "data/cache"

    @classmethod
    def discover(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(arguments.get("root"), str):
            return {}  # the check of the arguments says so
        names = arguments.get("class_names", "auto")
        names = class_names(arguments["root"]) if names == "auto" else names
        return {"num_classes": len(names), "class_names": names}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = os.path.expanduser(self.root)
        self._caches: dict[tuple[int, bool], TensorData | FolderData] = {}
        if not isinstance(self.class_names, list) or not isinstance(self.num_classes, int):
            found = self.discover({"root": self.root, "class_names": self.class_names or "auto"})
            self.class_names, self.num_classes = found["class_names"], found["num_classes"]

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = ImageDataModule.check_arguments(arguments)
        shape, size = arguments.get("input_shape"), arguments.get("cache_size")
        if isinstance(size, int) and isinstance(shape, (list, tuple)) and len(shape) == 3 and size < max(shape[1:]):
            problems.append(("cache_size", f"{size} is less than the {max(shape[1:])} pixels of the input"))
        if arguments.get("folds") is not None:
            names = arguments.get("class_names")
            val = _present_splits(Path(str(arguments.get("root"))), names if isinstance(names, list) else ()).get("val")
            problems += [("folds", no_folds(val))] if val is not None else []
        return problems

    @property
    def _names(self) -> list[str]:
        assert isinstance(self.class_names, list)
        return self.class_names

    @cached_property
    def _splits(self) -> dict[Split, FolderData]:
        root = Path(self.root)
        if self.whole:
            return self._whole(_present_splits(root, self._names) or split_folders(root, self._names))
        parts = split_folders(root, self._names)
        check_classes(parts, self._names)
        say_unused(parts)
        splits = {split: self._read(folder) for split, folder in parts.items()}
        train = splits["train"]
        if parts["train"] == root:
            chosen = self.three_splits(train.labels, self.test_fraction)
            return {split: train.subset(indices) for split, indices in chosen.items()}
        if "val" not in splits:
            kept, chosen_for_val = self.train_and_val(train.labels)
            return splits | {"train": train.subset(kept), "val": train.subset(chosen_for_val)}
        if self.folds is not None:
            raise DataError(f"data.folds={self.folds}: {no_folds(parts['val'])}")
        return splits | {"train": train.subset(self.kept(train.labels))}

    def _whole(self, parts: dict[Split, Path]) -> dict[Split, FolderData]:
        """Of data that were not trained on, which may lack classes: a split that they do not have is all images."""
        check_classes(parts, self._names, all_of_them=False)
        found = {split: self._read(folder) for split, folder in parts.items()}
        files = [file for data in found.values() for file in data.files]
        labels = torch.cat([data.labels for data in found.values()])
        every = replace(next(iter(found.values())), files=files, labels=labels)
        return {split: found.get(split, every) for split in ("train", "val", "test")}

    def files(self, split: Split) -> list[tuple[str, str]]:
        root = os.path.join(Path(self.root), "")
        return [(path.removeprefix(root).replace(os.sep, "/"), path) for path in self.dataset(split).files]

    def _read(self, folder: Path) -> FolderData:
        files: list[str] = []
        labels: list[int] = []
        folders = class_folders(folder)
        for label, name in enumerate(self._names):
            found = image_files(folders[name], within=folder) if name in folders else []
            if not found and not self.whole:
                raise DataError(f"the folder of class {name!r} holds no image: {folders[name]}")
            files += found
            labels += [label] * len(found)
        numbers = torch.tensor(labels, dtype=torch.int64)
        decode, channels = check_decode(self.decode), self.input_shape[0]
        return FolderData(files, numbers, self._names, channels, decode, max_pixels=self.max_pixels)

    def source(self, split: Split, stored: bool) -> Any:
        data = self.dataset(split)
        if self.cache == "none":
            return data
        key = (id(data), stored)  # the test split may be val's own data
        if key not in self._caches:
            self._caches[key] = self._cached(data, stored)
        return self._caches[key]

    def _cached(self, data: FolderData, stored: bool) -> TensorData | FolderData:
        channels, height, width = self.input_shape
        fastest, processes = self.decode == "fastest", self._processes_here()
        if self.cache == "memory" and not stored:
            batches = ImageBatches(data, self.seed, self.input_shape, self.resize, None, fastest)
            return decoded(batches, self.max_bad_files, processes, shown=self._rank_and_world_size()[0] == 0)
        from boltlab.data.cache import Fitted, ImageCache

        size, fitted = None, None
        if stored:  # a tall image covers a wide input by its shorter side, so that must keep the input's longer one
            margin = (self.resize or round(min(height, width) * 8 / 7)) / min(height, width)
            size = self.cache_size or round(max(height, width) * margin)
        else:
            fitted = Fitted((height, width), self.resize, fastest)
        if self.cache == "memory":
            images = ImageCache.in_memory(
                data.files, channels, size, data.decode, processes=processes, max_pixels=self.max_pixels
            )
        else:
            images = ImageCache.open(
                data.files,
                channels,
                size,
                self.cache_format,
                self.cache_dir,
                data.decode,
                fitted=fitted,
                max_pixels=self.max_pixels,
            )
        stacked = None if stored else images.stacked()
        if stacked is not None and fits_in_memory(processes * stacked.nbytes):
            return TensorData(to_batch(stacked), data.labels)
        return replace(data, cache=images, fitted=not stored)

    def load(self, split: Split) -> FolderData:
        if split == "test" and "test" not in self._splits:
            rank_zero_warn(f"{self.root} has no folder 'test': the test split is the validation split")
            return self._splits["val"]
        return self._splits[split]


def decoded(batches: ImageBatches, max_bad_files: int, processes: int = 1, shown: bool = True) -> TensorData:
    """All readable images of the batches' source, fitted, in memory. DataError if that has no room for them.

    processes: on this machine, each of which keeps as much.
    """
    channels, height, width = batches.input_shape
    count = len(batches)
    refuse_without_room(count, count * channels * height * width, processes)
    loader = Loader(batches, EvalSampler(count, 256), max_bad_files, max(1, available_cores() // processes))
    x, y, done = torch.empty(count, channels, height, width, dtype=torch.uint8), torch.empty(count, dtype=torch.long), 0
    with progress_bar(count, 0, "decoding images", shown) as advance:
        for images, labels in loader:
            part = slice(done, done + len(images))
            x[part], y[part], done = images, labels, part.stop
            advance(len(images))
    if not done:
        raise DataError("no image of the split can be read; boltlab doctor lists the reasons")
    return TensorData(x[:done], y[:done])


def split_folders(root: Path, classes: Collection[str] = ()) -> dict[Split, Path]:
    """The folder of each split; of train alone, root itself, where the class folders stand straight in root.

    classes: their names, where they are known; see `splits_by_name`.
    """
    root = root.expanduser()
    if not root.is_dir():
        what = "is a file, not a folder: unpack it first" if root.is_file() else "does not exist"
        raise DataError(
            f"data.root={root} {what} (looked for {root.absolute()}).\n"
            f"  expected: {root}/train/<class>/<image>, with val and test beside train; or {root}/<class>/<image>\n"
            f"  without data of your own: data=digits"
        )
    parts = _present_splits(root, classes)
    if parts and "train" not in parts:
        names = ", ".join(path.name for path in parts.values())
        raise DataError(f"{root} has {names}, but no folder 'train'; or that is a class: data.class_names=[…]")
    return parts or {"train": root}


def _present_splits(root: Path, classes: Collection[str] = ()) -> dict[Split, Path]:
    return splits_by_name(root.expanduser(), classes)


def say_unused(parts: dict[Split, Path]) -> None:
    """Names the folders beside the splits, or beside the root, that could be splits: they have the same classes."""
    train = parts["train"]
    if len(parts) == 1 and (split_of(train.name) or ("", ""))[0] != "train":
        return  # class folders straight in root
    names = class_folders(train)
    beside = [path for path in folders(train.parent) if path not in parts.values()]
    if unused := [path.name for path in beside if all((path / name).is_dir() for name in names)]:
        rank_zero_warn(
            f"not used: {listed(sorted(unused), None)} beside {train}, with the same classes; the splits are those"
            " named train, val and test straight in data.root"
        )


def class_folders(folder: Path) -> dict[str, Path]:
    """Class name: folder, sorted by name. Hidden folders (.ipynb_checkpoints) and links to a parent are no class.

    Names are compared as Unicode NFC, for macOS writes "é" as two characters. A byte that is no UTF-8 reads "\\xe9":
    configs, logs and trackers take text.
    """
    parents = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
    found: dict[str, Path] = {}
    for path in folders(folder):
        if os.path.realpath(path) not in parents:
            found[unicodedata.normalize("NFC", os.fsencode(path.name).decode(errors="backslashreplace"))] = path
    return dict(sorted(found.items()))


def image_files(folder: Path, within: Path) -> list[str]:
    """All images below a class folder, sorted; follows links, but not one that leads back into `within`."""
    outside, inside = os.path.realpath(within), os.path.realpath(folder)
    seen: set[str] = set()
    files: list[str] = []
    for parent, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        loops = outside.startswith(real + os.sep) or real == outside or inside.startswith(real + os.sep)
        other_class = real.startswith(outside + os.sep) and not (real + os.sep).startswith(inside + os.sep)
        if real in seen or loops or other_class:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        files += [
            parent + os.sep + name
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    return files


def class_names(root: str | Path) -> list[str]:
    """Names of the classes below root; DataError if there are none or the splits differ."""
    parts = split_folders(Path(root))
    classes = class_folders(parts["train"])
    refuse_other_level(parts["train"], classes, is_root=parts["train"] == Path(root).expanduser())
    check_classes(parts, list(classes))
    return list(classes)


def check_classes(parts: dict[Split, Path], names: list[str], all_of_them: bool = True) -> None:
    """DataError unless every split has these classes and no others: a shifted label is worse than a stop."""
    folder = next(iter(parts.values()))
    if not names or not any(map(class_folders, parts.values())):
        nevertheless = f"; or {folder.name!r} is a class: data.class_names=[…]" if split_of(folder.name) else ""
        expected = f"Expected: {folder}/<class>/<image>{nevertheless}"
        raise DataError(f"no classes in {folder}: {without_classes(folder)}. {expected}")
    problems: list[str] = []
    for split, path in parts.items():
        problems += _mismatch(split, path, names, all_of_them)
    if problems:
        raise DataError(
            f"the class folders in {folder.parent if len(parts) > 1 else folder} do not match:\n  "
            + "\n  ".join(problems)
            + f"\n  the classes: {listed(names, None, 10)}"
        )


def _mismatch(split: Split, path: Path, names: list[str], all_of_them: bool) -> Iterator[str]:
    """What the class folders of a split have that the classes have not, or lack."""
    found = class_folders(path)
    counts = Counter(unicodedata.normalize("NFC", each.name) for each in folders(path))
    if twice := sorted(counts - Counter(list(counts))):
        yield f"{split} has two folders named {listed(twice, None)}, in two forms of Unicode: join them"
    if all_of_them and len(found) < 2 and not found.keys() & set(names):
        unlabelled = f"; of images without labels, boltlab predict input={path}" if split == "test" else ""
        yield f"{split}: {without_classes(path)}{unlabelled}"
        return
    missing, unknown = [n for n in names if n not in found], [n for n in found if n not in names]
    if missing and all_of_them:
        yield f"{split} lacks {listed(missing, None, 10)}"
    if unknown:
        yield f"{split} has {listed(unknown, None, 10)} besides"


def check_folder(
    root: str | Path, channels: Literal[1, 3] = 3, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Path, str]]:
    """Decode every image below root and yield (path, reason) for each problem, as they are found."""
    parts: dict[Split, Path] = {}
    try:
        parts = split_folders(Path(root))
        class_names(root)
    except DataError as error:
        yield Path(root), str(error)
    for folder in parts.values():
        for stray in sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file()):
            yield stray, "in no class folder, so it is not used"
        for name, path in class_folders(folder).items():
            files = image_files(path, within=folder)
            if not files:
                yield path, f"the folder of class {name!r} holds no image"
            yield from _unreadable(files, channels, max_pixels)


def _unreadable(files: list[str], channels: int, max_pixels: int) -> Iterator[tuple[Path, str]]:
    def problem(file: str) -> str | None:
        try:
            read_image(file, channels, max_pixels)
        except DataError as error:
            return str(error).removeprefix(f"{file}: ")
        return None

    for file, reason in zip(files, in_order(problem, files, min(8, available_cores())), strict=True):
        if reason is not None:
            yield Path(file), reason
