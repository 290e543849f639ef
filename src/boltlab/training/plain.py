"""What a LightningModule and a LightningDataModule of anybody offer to a verb, and what they lack."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from boltlab.ground.errors import UserError


def has(owner: Any, method: str) -> bool:
    """Whether a module or data module brings a method of Lightning's itself."""
    parent: Any = LightningDataModule if isinstance(owner, LightningDataModule) else LightningModule
    return bool(is_overridden(method, owner, parent))


def lacks(method: str, *owners: Any) -> str | None:
    """Says that none of the owners brings a method; None where one does."""
    if any(has(owner, method) for owner in owners):
        return None
    return f"{type(owners[0]).__name__} has no {method}"


def need(verb: str, model: Any, data: Any, step: str, *loaders: str) -> None:
    """
    Raises:
        UserError: the module has no such step, or neither it nor the data module has one of the loaders.
    """
    lacking = [lack] if (lack := lacks(step, model)) else []
    if all(lacks(loader, data, model) for loader in loaders):
        lacking.append(f"{type(data).__name__} has no {' or '.join(loaders)}")
    if lacking:
        raise UserError(f"{verb} calls {step} on the batches of {' or '.join(loaders)}: {' and '.join(lacking)}")


def in_order(loader: Any) -> Any:
    """A training's loader, or each of several, with every sample of its dataset once, in stored order; others than
    torch's as they are."""
    return tree_map(_in_order, loader)


def _in_order(loader: Any) -> Any:
    whole = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler
    if not whole or isinstance(loader.dataset, IterableDataset):
        return loader
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    kept = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, loader.batch_size, sampler=SequentialSampler(loader.dataset), **kept)


def take_over(data: Any, content: dict[str, Any]) -> None:
    """Gives a data module its state in a checkpoint, where Lightning would."""
    state = content.get(type(data).__qualname__)
    if isinstance(state, dict):
        data.load_state_dict(state)


def rows(batch: Any, indices: torch.Tensor, size: int) -> Any:
    """A batch of the samples at `indices` of a batch of `size`: of every tensor in it, its rows.

    Raises:
        UserError: it holds something whose rows are not known.
    """
    if not all(isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == size for leaf in tree_leaves(batch)):
        raise UserError(f"a batch of {size} samples cannot be made larger: it holds more than tensors [{size}, …]")
    return tree_map(lambda tensor: tensor[indices], batch)


def describe(batch: Any) -> str:
    """The kinds and shapes in a batch, for people: `float32 [64, 1, 8, 8], int64 [64]`."""
    leaves = [
        f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        if isinstance(leaf, torch.Tensor)
        else type(leaf).__name__
        for leaf in tree_leaves(batch)
    ]
    return ", ".join(leaves[:6]) + ", …" * (len(leaves) > 6)
