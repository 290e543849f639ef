"""Which folders below the root of an image data set are its splits, by their names, and what is laid out otherwise."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from boltlab.data.base import Split
from boltlab.data.splits import listed
from boltlab.ground.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
              ".pbm", ".pnm", ".jp2", ".avif", ".tga")  # fmt: skip
_WORD = re.compile("(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)", re.IGNORECASE)
_ORDER: tuple[Split, ...] = ("train", "val", "test")


def folders(folder: Path) -> Iterator[Path]:
    """Those straight in a folder; hidden ones (.ipynb_checkpoints) and macOS's are none of the data."""
    for path in folder.iterdir():
        if not path.name.startswith((".", "__MACOSX")) and path.is_dir():
            yield path


def holds_images(folder: Path) -> bool:
    """Whether images stand straight in a folder."""
    with os.scandir(folder) as entries:
        return any(e.name.lower().endswith(EXTENSIONS) and not e.name.startswith(".") for e in entries)


def split_of(name: str) -> tuple[Split, str] | None:
    """The split that a folder's name speaks of, and the rest of the name: ("train", "seg_*") of seg_train."""
    found = _WORD.search(name)
    if found is None:
        return None
    split: Split = found.lastgroup  # type: ignore[assignment]
    return split, f"{name[: found.start()]}*{name[found.end() :]}".casefold()


def splits_by_name(root: Path, classes: Collection[str] = ()) -> dict[Split, Path]:
    """The folder of each split: train, val and test or the like (Training, valid), in any case; where there is none,
    such words in names that are alike but for them, train among them (seg_train, seg_test).

    classes: their names, where they are known. All of them straight in root: it has no splits, however they are named.

    Raises:
        DataError: two folders are the same split, or it cannot be told which of them are the splits.
    """
    found = _alike_but_for_words(root, classes)
    alike = [parts for parts in found.values() if {"train"} < {split for split, _ in parts}]
    parts = found.get("*") or (alike[0] if alike else [])
    named = dict(sorted(parts))
    if len(named) < len(parts) or ("*" not in found and len(alike) > 1):
        several = parts if len(named) < len(parts) else [part for parts in alike for part in parts]
        names = listed(sorted(path.name for _, path in several), None, 10)
        raise DataError(f"{root} has {names}, more than one folder for a split: leave one of each, train, val and test")
    return {split: named[split] for split in _ORDER if split in named}


def _alike_but_for_words(root: Path, classes: Collection[str]) -> dict[str, list[tuple[Split, Path]]]:
    """The folders whose names speak of splits, by the rest of the name; none where the classes stand straight here."""
    here = list(folders(root)) if root.is_dir() else []
    others = [name for name in classes if (split_of(name) or ("", ""))[1] != "*"]
    found: dict[str, list[tuple[Split, Path]]] = defaultdict(list)
    if others and {path.name for path in here}.issuperset(classes):
        return found
    for path in here:
        if about := split_of(path.name):
            found[about[1]].append((about[0], path))
    return found


def _through_single_folders(folder: Path) -> Path:
    """The first folder below that holds images, splits, or more folders than one."""
    inner = folder
    while len(inside := list(folders(inner))) == 1 and not holds_images(inner):
        if inner != folder and splits_by_name(inner):
            break
        inner = inside[0]
    return inner


def refuse_other_level(folder: Path, classes: dict[str, Path], is_root: bool) -> None:
    """DataError where what looks like classes are folders around the classes or around the splits.

    is_root: the class folders stand straight in the root, not in its train.
    """
    inner = _through_single_folders(folder)
    splits: dict[Split, Path] = {}
    for path in classes.values():
        if not splits and not holds_images(path):
            splits = splits_by_name(path)
    around = inner != folder and not holds_images(inner)
    if not around and not {"train"} < splits.keys():
        return
    what = f"{folder} has the classes {listed(list(classes), None)}"
    if around:
        names = listed(sorted(path.name for path in folders(inner)), None)
        cure = f"data.root={inner}" if is_root else f"move what is in it to {folder}"
        what = f"{folder} has no folder but {next(iter(classes))!r}, and {names} stand in {inner}: {cure}"
    else:
        within = next(iter(splits.values())).parent
        what += f", and {within} has {', '.join(path.name for path in splits.values())}: the splits stand outside of"
        what += f" the classes, {folder if is_root else folder.parent}/train/<class>/<image>"
    raise DataError(f"{what}. If they are classes nevertheless: data.class_names=[{','.join(classes)}]")


def without_classes(folder: Path) -> str:
    """What to say of a folder that has none of the class folders."""
    if not holds_images(folder) and not any(map(holds_images, folders(folder))):
        return "it has no class folder"
    tables = (
        p.name for near in (folder, folder.parent) for p in near.iterdir() if p.suffix in (".csv", ".tsv", ".txt")
    )
    said = "its images stand in no class folder: move or link each into that of its class"
    if found := sorted(set(tables)):
        said += f", which {listed(found, None)} may tell (docs/images.md has the few lines that do it)"
    return said


def no_folds(val: Path) -> str:
    return (
        f"{val} is a validation set of its own, and folds divide the samples that train and val share: leave folds out,"
        f" or take a root without {val.name}"
    )
