"""Which samples each batch of a plain DataLoader holds: its own sampler, run under a key, shared by processes."""

import math
import zlib
from collections.abc import Callable, Iterator
from itertools import count, islice, pairwise
from typing import Any

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from boltlab.data.samplers import random_key
from boltlab.ground.errors import DataError, UserError
from boltlab.training.draws import Generators, seed_all

# They keep no state of their own from one epoch to the next: it need not be tried.
_STATELESS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Order:
    """The batches of one loader, by epoch.

    The sampler is not replaced: it is run under the seeds of (run, epoch, round, batch), so a finite one of any kind
    gives the same batches in each process that asks. Where a sampler counts its epochs itself, they are planned one
    after the other again (`history`).

    shares: (processes, rank), where the loader does not share its samples by itself.
    """

    def __init__(self, loader: Any, training: bool, shares: tuple[int, int], key: Callable[..., int]) -> None:
        self.loader, self.training, self.shares, self.key = loader, training, shares, key
        self.source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.generators = Generators([loader.generator, self.source])
        self.history: list[list[int]] = []  # (epoch, round) of each plan, where a plan depends on those before
        self.sized = _length(loader) is not None
        inner = self.source.sampler if type(self.source) is BatchSampler else self.source
        self._known = type(inner) in _STATELESS
        self._pure = True if self._known or not self.sized else None
        self.shared = shares[0] > 1 and not _shares_by_itself(loader)
        if self.shared:
            _refuse_what_cannot_be_shared(loader, training, shares[0])

    def length(self) -> int:
        """Batches of this process, where the samples are shared."""
        sampler, size, drop_last = _batching(self.loader)
        processes, _ = self.shares
        if not self.training:
            return _evaluated(len(sampler), size or 1, drop_last, self.shares)
        own = math.ceil(len(sampler) / processes)
        return own if size is None else own // size if drop_last else math.ceil(own / size)

    @property
    def pure(self) -> bool:
        """Whether the order is a function of its seeds: it is asked twice, where the samplers are not torch's own."""
        if self._pure is None:
            self._pure = list(self._run(0, 0)) == list(self._run(0, 0))
        return self._pure

    def plan(self, epoch: int, round: int, history: list[list[int]]) -> Iterator[Any]:
        """The batches of an epoch: lists of indices, or single ones where the loader has no batches.

        history: the plans of the run before, where it was interrupted and the order depends on them.
        """
        if not self.pure:
            for place in history[len(self.history) :]:
                if place != [epoch, round]:
                    list(self._run(*place))
                    self.history.append(place)
            self.history.append([epoch, round])
        return self._run(epoch, round)

    def _run(self, epoch: int, round: int) -> Iterator[Any]:
        if self.training:
            for sampler in (self.source, getattr(self.source, "sampler", None)):
                getattr(sampler, "set_epoch", _nothing)(epoch)
        key = self.key(epoch, round)
        if not self.shared:
            batches = self._seeded(self.source, key)
            return islice(batches, _length(self.loader)) if self.sized else batches
        sampler, size, drop_last = _batching(self.loader)
        flat = list(self._seeded(sampler, key))
        return iter(_share(flat, size, drop_last, self.training, self.shares))

    def _seeded(self, source: Any, key: int) -> Iterator[Any]:
        iterator = None
        for n in count():
            if n == 0 or not self._known:  # for each, where a step may draw in between
                seed_all(random_key(key, n))
                self.generators.seed(random_key(key, n))
            iterator = iter(source) if iterator is None else iterator
            try:
                yield next(iterator)
            except StopIteration:
                return


def _nothing(epoch: int) -> None:
    """Of a sampler that does not ask for the epoch."""


def checksum(batches: list[Any]) -> int:
    return zlib.crc32(repr(batches).encode())


def _length(loader: Any) -> int | None:
    try:
        return len(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def _shares_by_itself(loader: Any) -> bool:
    """Whether it is as torch's DistributedSampler, or made of one."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)


def _batching(loader: Any) -> tuple[Any, int | None, bool]:
    """(sampler of single indices, batch size or None, drop_last)."""
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size, batches.drop_last
    return batches, None, False


def _refuse_what_cannot_be_shared(loader: Any, training: bool, processes: int) -> None:
    """
    Raises:
        UserError: the batches cannot be divided over the processes without knowing how they are made.
        DataError: there are fewer samples than processes.
    """
    name = f"the {'train' if training else 'evaluation'} DataLoader of {type(loader.dataset).__name__}"
    own = loader.batch_sampler
    problem = None
    if own is not None and type(own) is not BatchSampler:
        problem = f"{type(own).__name__} makes its batches"
    elif _length(loader) is None:
        problem = "its sampler has no length"
    if problem:
        raise UserError(
            f"{name} cannot be shared by {processes} processes, for {problem}: give it a sampler of single indices"
            " with a length, or one that shares by itself and has `num_replicas` and `rank`"
        )
    samples = len(_batching(loader)[0])
    if samples < processes:
        raise DataError(f"{name} has {samples} samples, too few for {processes} processes")
    if not training and _batching(loader)[1] is None and samples % processes:
        raise UserError(
            f"{name} has no batches, and its {samples} samples cannot be shared evenly by {processes} processes:"
            " give it a batch_size"
        )


def _evaluated(samples: int, size: int, drop_last: bool, shares: tuple[int, int]) -> int:
    fewest = samples // shares[0]
    return fewest // size if drop_last else math.ceil(fewest / size)


def _share(flat: list[Any], size: int | None, drop_last: bool, training: bool, shares: tuple[int, int]) -> list[Any]:
    """The batches of one process. Training is padded as torch does it; an evaluation counts no sample twice.

    All processes get equal numbers of batches, for uneven ones hang where buffers are synchronized. So in an evaluation
    a batch may hold one sample more.
    """
    processes, rank = shares
    if training:
        flat = flat + (flat * math.ceil(processes / len(flat)))[: -len(flat) % processes]
    own = flat[rank::processes]
    if size is None:
        return own
    if training:
        batches = [own[i : i + size] for i in range(0, len(own), size)]
        return batches[:-1] if drop_last and len(batches[-1]) < size else batches
    number = _evaluated(len(flat), size, drop_last, shares)
    if drop_last:
        return [own[i * size : (i + 1) * size] for i in range(number)]
    least, more = divmod(len(own), number)
    ends = [i * least + min(i, more) for i in range(number + 1)]
    return [own[a:b] for a, b in pairwise(ends)]
