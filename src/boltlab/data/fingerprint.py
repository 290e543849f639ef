"""What data a run has, so that another time or another machine can tell whether it has the same: numbers and hashes.

Of each split that a run loads: samples, classes, samples of each class, SHA-256 of the labels in their order; of what
is in memory shape, type and SHA-256 of the values; of what is read from files their number, their bytes, and SHA-256 of
their names (below the data's folder) and sizes. Nothing else of a file is looked at, unless "contents" are asked for:
SHA-256 of every byte. Times, the order of a listing, and where the folder lies change nothing.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from boltlab.data.base import DataModule, Split
from boltlab.data.loader import TensorData
from boltlab.data.many_files import of_each
from boltlab.ground.files import opened

# Values in memory are hashed at once up to here (1 GB/s on one core); beyond it when contents are asked for.
MOST_BYTES = 256 << 20

# The only difference that data which are the same can have: what is computed from the source rounds with the machine.
ROUNDED = "values, which are computed: another machine or version rounds them otherwise"


def fingerprint(data: DataModule, split: Split, contents: bool = False) -> dict[str, Any]:
    """Of one split, which is loaded if it was not before."""
    return of_samples(data, split, contents) | of_files(data, split, contents)


def of_samples(data: DataModule, split: Split, contents: bool = False) -> dict[str, Any]:
    """What is in memory of a split."""
    dataset = data.dataset(split)
    found: dict[str, Any] = {"samples": len(dataset)}
    labels = getattr(dataset, "labels", None)
    if isinstance(labels, Tensor):
        if not labels.is_floating_point():
            counts = data.class_counts(split)
            found |= {"classes": len(counts), "samples_per_class": counts.tolist()}
        found["labels"] = _hash_of_tensor(labels)
    if isinstance(dataset, TensorData):
        found |= {"shape": list(dataset.x.shape[1:]), "dtype": str(dataset.x.dtype).removeprefix("torch.")}
        if contents or dataset.x.nbytes <= MOST_BYTES:
            found["values"] = _hash_of_tensor(dataset.x)
    return found


def of_files(data: DataModule, split: Split, contents: bool = False) -> dict[str, Any]:
    """Of the files that a split is read from, if any: a million of them take seconds, on a network's disk minutes."""
    files = data.files(split)
    if not files:
        return {}
    names = [name if name.isascii() else unicodedata.normalize("NFC", name) for name, _ in files]
    paths = [path for _, path in files]
    sizes = of_each(paths, _size)
    found: dict[str, Any] = {"files": len(files), "bytes": sum(max(size, 0) for size in sizes)}
    found["names_and_sizes"] = _hash_of_lines(names, sizes)
    if contents:
        found["contents"] = _hash_of_lines(names, of_each(paths, _hash_of_file))
    return found


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two fingerprints of a split contradict each other in, for people; what only one of them knows is no such."""

    def differ(*keys: str) -> bool:
        return any(key in then and key in now and then[key] != now[key] for key in keys)

    counted = ("samples", "classes", "files", "bytes")
    found = [f"{_count(then[key])} {key}, now {_count(now[key])}" for key in counted if differ(key)]
    if differ("samples_per_class") and not differ("samples"):
        found.append("samples of each class")
    if differ("shape", "dtype"):
        found.append(f"{then.get('dtype')} {then.get('shape')}, now {now.get('dtype')} {now.get('shape')}")
    if differ("names_and_sizes") and not differ("files", "bytes"):
        found.append("names or sizes of files")
    if found:
        return found
    found += ["labels, or their order"] * differ("labels") + ["contents of files"] * differ("contents")
    if differ("values") and not found:
        found.append(ROUNDED if str(now.get("dtype")).startswith(("float", "bfloat")) else "values")
    return found


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _hash_of_tensor(values: Tensor) -> str:
    raw: Any = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def _hash_of_lines(names: Iterable[str], values: Iterable[Any]) -> str:
    lines = sorted(f"{name}\0{value}" for name, value in zip(names, values, strict=True))
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere; reading it is for the training to complain of
        return -1


def _hash_of_file(path: str) -> str:
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError:
        return "unreadable"
