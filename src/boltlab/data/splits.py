"""Which samples are for training and which are set aside: by a fraction, by the folds of a cross-validation, by number.

All are functions of labels and a seed. Integer labels (int64 [N]) are stratified by class; float labels (regression)
are taken at random. Indices are int64 and sorted.
"""

from typing import Any

import torch
from torch import Tensor

from boltlab.data.samplers import random_key
from boltlab.ground.errors import DataError


def split_off(
    labels: Tensor, size: float | int, seed: int, class_names: list[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `size` samples (a fraction, or a number if it is an int): (indices of the rest, chosen).

    Every class gives its share, to within one sample, and keeps at least one. Where classes are too small to give
    theirs, the others give what is missing, each its share of what it can spare.

    Raises:
        DataError: a part would be empty; or classes have no sample to spare, named as in `class_names`.
    """
    count = round(len(labels) * size) if isinstance(size, float) else size
    if not 0 < count < len(labels):
        raise DataError(f"cannot split {size} off {len(labels)} samples: both parts need at least one")
    order = _shuffled(len(labels), seed)
    if labels.is_floating_point():
        chosen = order[:count]
    else:
        counts = torch.bincount(labels)
        spare = (counts - 1).clamp(min=0)
        if count > spare.sum():
            raise DataError(_too_few_to_split(counts, count, class_names))
        take = _shares(counts, count).minimum(spare)
        take += _shares(spare - take, count - int(take.sum()))
        order, place = _by_class(order, labels)
        chosen = order[place < take[labels[order]]]
    return _rest_and(chosen, len(labels))


def take_fold(
    labels: Tensor, folds: int, fold: int, seed: int, class_names: list[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Part number `fold` of the samples divided into `folds` parts: (indices of the rest, of the part).

    The parts differ by one sample at most, as a whole and in every class, for the samples are dealt out one by one,
    class after class. Their order within a class follows (seed, folds).

    Raises:
        DataError: there are fewer samples than folds, or a class has fewer; it is named as in `class_names`.
    """
    order = _shuffled(len(labels), seed, folds)
    if len(labels) < folds:
        raise DataError(f"data.folds={folds}: there are {len(labels)} samples beside the test set, too few for that")
    if not labels.is_floating_point():
        few = [(count, label) for label, count in enumerate(torch.bincount(labels).tolist()) if 0 < count < folds]
        if few:
            count, label = min(few)
            raise DataError(
                f"data.folds={folds}: samples of class {listed([label], class_names)} beside the test set: {count}, and"
                " each fold needs one"
            )
        order, _ = _by_class(order, labels)
    return _rest_and(order[fold::folds], len(labels))


def thin_out(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` samples to keep. What a smaller count keeps is among what a larger one keeps.

    Every class keeps its share, rounded up while there is room: so at least one sample.

    Raises:
        DataError: there are more classes than `count`.
    """
    order = _shuffled(len(labels), seed)
    if not labels.is_floating_point():
        counts = torch.bincount(labels)
        if count < (classes := int((counts > 0).sum())):
            raise DataError(f"data.max_samples={count} is less than one sample of each of the {classes} classes")
        order, place = _by_class(order, labels)
        order = order[(place.double() / counts[labels[order]]).argsort(stable=True)]
    return order[:count].sort().values


def fold_problems(folds: Any, fold: Any) -> list[tuple[str, str]]:
    """(argument, message) of what is wrong with the numbers of a cross-validation."""
    if folds is None:
        return [] if fold is None else [("fold", "is a part of how many? give data.folds=… as well")]
    if not isinstance(folds, int) or folds < 2:
        return [("folds", "is less than 2 parts")]
    if fold is None:
        return [("folds", f"needs the part that validates: data.fold=0 to data.fold={folds - 1}")]
    if not isinstance(fold, int) or not 0 <= fold < folds:
        return [("fold", f"is none of the parts of data.folds={folds}, which are 0 to {folds - 1}")]
    return []


def listed(labels: list[Any], class_names: list[str] | None, shown: int = 3) -> str:
    """The first of some classes by their names, and how many more there are."""
    names = ", ".join(repr(class_names[label] if class_names else label) for label in labels[:shown])
    return names + (f" and {len(labels) - shown} more" if len(labels) > shown else "")


def _shares(counts: Tensor, count: int) -> Tensor:
    """`count` divided in proportion to `counts`, int64 [N]; none gets more than its own where the sum allows it."""
    quota = counts.double() * count / max(1, int(counts.sum()))
    take = quota.floor().long()
    by_remainder = (quota - take).argsort(descending=True, stable=True)
    take[by_remainder[: count - int(take.sum())]] += 1
    return take


def _too_few_to_split(counts: Tensor, count: int, class_names: list[str] | None) -> str:
    single, classes = (counts == 1).nonzero().flatten().tolist(), int((counts > 0).sum())
    alone = f", and {len(single)} of them have no other: {listed(single, class_names)}" if single else ""
    return (
        f"cannot split {count} off {int(counts.sum())} samples: each of the {classes} classes keeps one to train on"
        f"{alone}. Take a smaller fraction or join classes; if the labels are measurements, data.task=regression"
    )


def _shuffled(count: int, *key: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(random_key(*key)))


def _by_class(order: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The samples of `order` class after class, in each class in that order; and the place of each in its class."""
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[order]]


def _rest_and(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()
