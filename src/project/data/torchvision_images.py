"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100: torchvision's addresses, checksums and readers, kept in memory."""

import shutil
import socket
import tempfile
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

    @property
    def archives(self) -> list[Path]:
        """Where torchvision keeps what the data set is unpacked from."""
        if hasattr(self.dataset_class, "resources"):
            return [self.folder / name for name, _ in self.dataset_class.resources]
        return [self.folder.parent / self.dataset_class.filename]

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
            self._download()
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
        files, below = ", ".join(archive.name for archive in self.archives), self.archives[0].parent
        return (
            f"{self.name} is missing or damaged, and could not be downloaded.\n"
            f"  looked in: {self.folder} ({reason})\n"
            f"  tried: {tried}\n"
            f"  to get it: let this machine reach these addresses, or put {files} into {below},\n"
            f"    or point data_dir= at a folder that has it\n"
            f"  without a network: data=digits (handwritten digits that scikit-learn carries)"
        )

    def _download(self) -> None:
        """torchvision's own, in a private folder from which whole files are moved.

        So neither a second process nor an interruption ever leaves a part of a file under its final name. Archives that
        already lie where torchvision keeps them are used if their checksum is right. OSError says what failed where.
        """
        root = Path(self.data_dir).absolute()
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True) as private:
            for archive in filter(Path.exists, self.archives):
                copy = private / archive.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, copy)
            self._fetch(private)
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in (private / self.folder.relative_to(root)).iterdir():
                if self.folder / file.name not in self.archives:
                    file.replace(self.folder / file.name)

    def _fetch(self, root: str) -> None:
        """Download and unpack below `root`, in some rounds over all mirrors; what is right is fetched once."""
        rank_zero_info(f"downloading {self.name}")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT_SECONDS)
        try:
            for _ in range(ROUNDS):
                try:
                    self.dataset_class(root, download=True)
                    return
                except (RuntimeError, OSError, HTTPException) as error:
                    problem = str(error).replace("File not found or corrupted.", "the file is not the right one")
            address = getattr(self.dataset_class, "url", "")  # MNIST's mirrors are in torchvision's message
            raise ConnectionError(" ".join([address, *problem.split()]).strip())
        finally:
            socket.setdefaulttimeout(before)
