"""Which samples, in which order, on which process; and the random numbers that go with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from boltlab.ground.errors import DataError


def random_key(*numbers: int) -> int:
    """Mix integers such as (seed, epoch, index) into one 64-bit seed (SplitMix64, Steele et al. 2014)."""
    mask, key = 0xFFFF_FFFF_FFFF_FFFF, 0
    for number in numbers:
        key = (key + number + 0x9E37_79B9_7F4A_7C15) & mask
        key = ((key ^ (key >> 30)) * 0xBF58_476D_1CE4_E5B9) & mask
        key = ((key ^ (key >> 27)) * 0x94D0_49BB_1331_11EB) & mask
        key ^= key >> 31
    return key


class Draws:
    """Uniform random numbers for the samples `indices` (int64 [B], on any device) of an epoch.

    Number `j` of a sample is a function of (seed, epoch, index, j) alone: it is the same in every process, thread and
    batch, and to the bit on every device. Drawing one number more somewhere moves no other.
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor) -> None:
        self.seed, self.epoch, self.indices = seed, epoch, indices
        self._keys = _mix(indices + _as_int64(random_key(seed, epoch) + _GOLDEN))

    def uniform(self, number: int) -> Tensor:
        """Number `number` of each sample, float32 [B] in 0..1 without 1."""
        return self.uniforms(number, 1)[:, 0]

    def uniforms(self, first: int, count: int) -> Tensor:
        """Numbers `first` to `first + count - 1` of each sample, float32 [B, count] in 0..1 without 1."""
        offsets = [_as_int64(number + _GOLDEN) for number in range(first, first + count)]
        keys = _mix(self._keys.unsqueeze(1) + torch.tensor(offsets, device=self._keys.device))
        return ((keys >> 40) & 0xFF_FFFF).float() * 2**-24


_GOLDEN = 0x9E37_79B9_7F4A_7C15


def _as_int64(number: int) -> int:
    """The signed number of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(keys: Tensor) -> Tensor:
    """What `random_key` does to the sum of key and number, on int64, which wraps around as uint64 does."""
    keys = (keys ^ ((keys >> 30) & 0x3_FFFF_FFFF)) * _as_int64(0xBF58_476D_1CE4_E5B9)
    keys = (keys ^ ((keys >> 27) & 0x1F_FFFF_FFFF)) * _as_int64(0x94D0_49BB_1331_11EB)
    return keys ^ ((keys >> 31) & 0x1_FFFF_FFFF)


@contextmanager
def own_random_state() -> Iterator[Callable[[int], object]]:
    """Yield the function that seeds torch's CPU generator; put the generator's state back at the end."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator.manual_seed  # not torch.manual_seed, which also seeds every accelerator
    finally:
        torch.default_generator.set_state(state)


class TrainSampler(SequentialSampler):
    """Yields (epoch, indices of one batch of this rank). Lightning calls `set_epoch` before each epoch.

    `start` batches of the epoch are left out (they were trained before the run was interrupted).

    The batches of all ranks together are the same for any number of ranks: consecutive pieces of the epoch's order, of
    which a rank takes each `world_size`-th sample. The last one is smaller; one that would hold a single sample is left
    out, for batch normalization cannot train on it. A rank that would get less than two samples of the last batch
    repeats others of it, behind its own, and they are not to be counted: `samples_in` says how many are.

    `labels` (int64 [N]) balances the classes: each draw takes a class, then one of its samples, with replacement.

    It is a SequentialSampler by name only: Lightning's `overfit_batches` replaces any other.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        labels: Tensor | None = None,
    ) -> None:
        if size < world_size:
            raise DataError(f"{size} training samples are too few for {world_size} processes")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self.by_class = None
        if labels is not None:
            members = [(labels == label).nonzero().flatten() for label in labels.unique().tolist()]
            self.by_class = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)
            self.class_sizes = torch.tensor([len(m) for m in members])
        together = batch_size * world_size
        single = size > together > 1 and size % together == 1
        self.batches = -(-(size - single) // together)
        self.last_size = size - single - (self.batches - 1) * together  # over all ranks

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int | None = None) -> Tensor:
        """Sample indices of a whole epoch (of the present one), over all ranks, int64 [N]."""
        generator = torch.Generator().manual_seed(random_key(self.seed, self.epoch if epoch is None else epoch))
        if self.by_class is not None:
            label = torch.randint(len(self.by_class), (self.size,), generator=generator)
            draw = torch.rand(self.size, generator=generator, dtype=torch.float64)
            return self.by_class[label, (draw * self.class_sizes[label]).long()]
        return torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)

    def __len__(self) -> int:
        return self.batches

    def samples_in(self, batch: int) -> tuple[int, int]:
        """Samples that count in batch number `batch` of an epoch: (on this rank, on all ranks)."""
        if batch != self.batches - 1:
            return self.batch_size, self.batch_size * self.world_size
        return len(range(self.rank, self.last_size, self.world_size)), self.last_size

    def _mine(self, epoch: int) -> Tensor:
        """Sample indices of this rank's batches of an epoch, one after the other, int64."""
        order, rank, before = self.order(epoch), self.rank, (self.batches - 1) * self.batch_size * self.world_size
        own = range(rank, self.last_size, self.world_size)
        repeated = range(rank + len(own), rank + min(2, self.batch_size, self.last_size))
        last = order[[before + place % self.last_size for place in (*own, *repeated)]]
        return torch.cat([order[:before][rank :: self.world_size], last])

    def batch_indices(self, epoch: int, batch: int) -> Tensor:
        """Sample indices of this rank's batch number `batch` in an epoch, int64 [B], however many a fetch holds."""
        return self._mine(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        mine = self._mine(epoch)[self.start * self.batch_size :]
        for indices in mine.split(self.batch_size) if len(mine) else ():
            yield epoch, indices


class EvalSampler(SequentialSampler):
    """Yields (0, indices of one batch of this rank): every sample once over all ranks, none twice.

    All ranks yield the same number of batches (FSDP hangs otherwise), so the last batch of a rank may hold one sample
    more than `batch_size` and the others do not notice.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if size < world_size:
            raise DataError(f"{size} samples to evaluate are too few for {world_size} processes")
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-(self.size // self.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        indices = torch.arange(self.rank, self.size, self.world_size)
        for batch in range(len(self)):
            last = batch == len(self) - 1
            yield 0, indices[batch * self.batch_size : None if last else (batch + 1) * self.batch_size]
