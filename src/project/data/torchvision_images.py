"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100: torchvision's addresses, checksums and readers, kept in memory."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from boltlab import DataError
from boltlab.data import ImageDataModule, Split, TensorData
from lightning.pytorch.utilities import rank_zero_info
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

ROUNDS = 2  # over all mirrors
TIMEOUT_SECONDS = 15.0  # without a byte; urllib would wait for ever


@dataclass(kw_only=True, eq=False, repr=False)
class TorchvisionImages(ImageDataModule):
    """Images uint8 [B,C,H,W]; validation is split off the official training set, the official test set is as it is.

    name: torchvision's name of the data set.
    data_dir: where data sets are kept; torchvision's own layout below it, so existing copies are found.
    """

    name: Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]
    data_dir: str = "data"

    @property
    def dataset_class(self) -> Any:
        return getattr(datasets, self.name)

    @property
    def folder(self) -> Path:
        below = getattr(self.dataset_class, "base_folder", f"{self.name}/raw")
        return Path(self.data_dir).absolute() / below

    def read(self, train: bool) -> TensorData:
        """torchvision's training or test set as tensors; whatever error torchvision meets."""
        data = self.dataset_class(self.data_dir, train=train)
        images = torch.as_tensor(data.data)  # [N,28,28], or [N,32,32,3]
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(data.targets).long()
        if len(images) != len(labels):
            raise RuntimeError(f"{len(images)} images, but {len(labels)} labels")
        return TensorData(images, labels)

    @cached_property
    def _splits(self) -> dict[Split, TensorData]:
        data = self.read(train=True)
        train, val = self.train_and_val(data.labels)
        return {"train": data.subset(train), "val": data.subset(val), "test": self.read(train=False)}

    def prepare_data(self) -> None:
        """Download what is missing or damaged. Safe when several processes do it at once."""
        reason = self._why_unreadable()
        if reason is None:
            return
        try:
            download(self.dataset_class, Path(self.data_dir), self.folder)
        except OSError as error:
            raise DataError(self._cannot_get(reason, str(error))) from error
        reason = self._why_unreadable()
        if reason is not None:
            raise DataError(f"{self.name} in {self.folder} was downloaded and is still unreadable: {reason}")

    def load(self, split: Split) -> TensorData:
        reason = self._why_unreadable()
        if reason is not None:
            raise DataError(self._cannot_get(reason, "not tried: prepare_data() downloads"))
        return self._splits[split]

    def _why_unreadable(self) -> str | None:
        try:
            self._splits  # noqa: B018 (reads the files)
        except DataError:
            raise
        except Exception as error:  # torchvision meets a damaged file with almost any exception
            if not self.folder.exists():
                return "no such folder"
            return "incomplete" if "download=True" in str(error) else f"damaged: {type(error).__name__}: {error}"
        return None

    def _cannot_get(self, reason: str, tried: str) -> str:
        files = ", ".join(Path(name).name for name in archives(self.dataset_class))
        below = self.folder if hasattr(self.dataset_class, "resources") else self.folder.parent
        return (
            f"{self.name} is missing or damaged, and could not be downloaded.\n"
            f"  looked in: {self.folder} ({reason})\n"
            f"  tried: {tried}\n"
            f"  to get it: let this machine reach these addresses, or put {files} into {below},\n"
            f"    or point data_dir= at a folder that has it\n"
            f"  without a network: data=digits (handwritten digits that scikit-learn carries)"
        )


def archives(dataset_class: Any) -> dict[str, tuple[str, list[str]]]:
    """File name: (MD5, addresses) of what the data set is downloaded from."""
    if hasattr(dataset_class, "resources"):
        return {name: (md5, [m + name for m in dataset_class.mirrors]) for name, md5 in dataset_class.resources}
    return {dataset_class.filename: (dataset_class.tgz_md5, [dataset_class.url])}


def download(dataset_class: Any, data_dir: Path, folder: Path) -> None:
    """Fetch, check and unpack in a private folder, then move file by file into `folder`.

    So neither a second process nor an interruption ever leaves a part of a file under its final name. Archives that
    already lie where torchvision keeps them are used if their checksum is right. OSError says what failed where.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
    try:
        is_mnist = hasattr(dataset_class, "resources")
        (staging / "unpacked").mkdir()
        for name, (md5, urls) in archives(dataset_class).items():
            at_hand = (folder if is_mnist else data_dir) / name
            if check_integrity(at_hand, md5):
                shutil.copyfile(at_hand, staging / name)
            else:
                fetch(urls, staging, name, md5)
            extract_archive(str(staging / name), str(staging / "unpacked"))
        unpacked = staging / "unpacked" if is_mnist else staging / "unpacked" / dataset_class.base_folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in unpacked.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fetch(urls: list[str], folder: Path, name: str, md5: str) -> None:
    """Download one file, trying every address `ROUNDS` times; ConnectionError lists what each of them said."""
    problems: dict[str, str] = {}
    rank_zero_info(f"downloading {name}")
    for url in urls * ROUNDS:
        try:
            with socket_timeout(TIMEOUT_SECONDS):
                download_url(url, str(folder), name, md5)
            return
        except (RuntimeError, OSError, HTTPException) as error:
            problems[url] = "the file is not the right one (checksum)" if "corrupted" in str(error) else str(error)
            (folder / name).unlink(missing_ok=True)
    raise ConnectionError("; ".join(f"{url}: {problem}" for url, problem in problems.items()))


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
