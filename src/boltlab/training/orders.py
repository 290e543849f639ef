"""Which samples each batch of a plain DataLoader holds: its own sampler, run under a key, shared by processes."""

import math
import zlib
from collections.abc import Callable, Iterator
from itertools import count, islice, pairwise
from typing import Any

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

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
        self.training, (self.processes, self.rank), self.key = training, shares, key
        self.source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        # Of single indices, where torch makes the batches; else of whatever the loader has.
        self.sampler, self.size, self.drop_last = self.source, None, False
        if type(self.source) is BatchSampler:
            self.sampler, self.size, self.drop_last = self.source.sampler, self.source.batch_size, self.source.drop_last
        self.generators = Generators([loader.generator, self.source])
        self.history: list[list[int]] = []  # (epoch, round) of each plan, where a plan depends on those before
        self.sized = _length(self.source) is not None
        self._known = type(self.sampler) in _STATELESS
        self._pure = True if self._known or not self.sized else None
        # One as torch's DistributedSampler, or made of one, shares by itself.
        samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        self.shared = self.processes > 1 and not any(hasattr(sampler, "num_replicas") for sampler in samplers)
        if self.shared:
            self._refuse_what_cannot_be_shared(loader)

    def length(self) -> int:
        """Batches of this process, where the samples are shared."""
        return self._number(len(self.sampler))

    def _number(self, samples: int) -> int:
        own, size = samples // self.processes, self.size or 1
        if self.training:
            own = math.ceil(samples / self.processes)
        return own // size if self.drop_last else math.ceil(own / size)

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
        samplers: tuple[Any, ...] = (self.source, getattr(self.source, "sampler", None))
        for sampler in samplers:
            if self.training and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        key = self.key(epoch, round)
        if self.shared:
            return iter(self._share(list(self._seeded(self.sampler, key))))
        return islice(self._seeded(self.source, key), _length(self.source))

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

    def _share(self, flat: list[Any]) -> list[Any]:
        """The batches of one process. Training is padded as torch does it; an evaluation counts no sample twice.

        All processes get equal numbers of batches, for uneven ones hang where buffers are synchronized. So in an
        evaluation a batch may hold one sample more.
        """
        number, size = self._number(len(flat)), self.size
        if self.training:
            flat = flat + flat[: -len(flat) % self.processes]
        own = flat[self.rank :: self.processes]
        if size is None:
            return own
        if self.training or self.drop_last:
            return [own[i * size : (i + 1) * size] for i in range(number)]
        least, more = divmod(len(own), number)
        ends = [i * least + min(i, more) for i in range(number + 1)]
        return [own[a:b] for a, b in pairwise(ends)]

    def _refuse_what_cannot_be_shared(self, loader: Any) -> None:
        """
        Raises:
            UserError: the batches cannot be divided over the processes without knowing how they are made.
            DataError: there are fewer samples than processes.
        """
        name = f"the {'train' if self.training else 'evaluation'} DataLoader of {type(loader.dataset).__name__}"
        processes, problem = self.processes, "" if self.sized else "its sampler has no length"
        if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
            problem = f"{type(loader.batch_sampler).__name__} makes its batches"
        if problem:
            raise UserError(
                f"{name} cannot be shared by {processes} processes, for {problem}: give it a sampler of single indices"
                " with a length, or one that shares by itself and has `num_replicas` and `rank`"
            )
        samples = len(self.sampler)
        if samples < processes:
            raise DataError(f"{name} has {samples} samples, too few for {processes} processes")
        if not self.training and self.size is None and samples % processes:
            raise UserError(
                f"{name} has no batches, and its {samples} samples cannot be shared evenly by {processes} processes:"
                " give it a batch_size"
            )


def checksum(batches: list[Any]) -> int:
    return zlib.crc32(repr(batches).encode())


def _length(sampler: Any) -> int | None:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError, AttributeError):
        return None
