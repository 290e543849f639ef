"""The one seam of loaders: Lightning passes every loader through `prepare`, wherever it comes from.

A plain DataLoader then has its order, its draws and its place fixed by the seed, is shared by the processes, and knows
where it stands. What has a `state_dict` of its own, as the engine's loaders, is left alone.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial, wraps
from itertools import chain, count, islice
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from boltlab.data.samplers import random_key
from boltlab.training.draws import DATA, MAKING, ORDER, WORKERS, Generators, Seeded, collated, seed_all
from boltlab.training.orders import Order, checksum

_KEPT = (
    *("num_workers", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers"),
    *("multiprocessing_context", "pin_memory_device", "in_order"),
)
_STAGES = ("train", "val", "test")


class Seam:
    """What the loaders of a Trainer share: the seed, the place in the training, and what cannot be exact.

    seconds: how long worker processes may take for a batch.
    """

    trainer: Any  # set as soon as there is one

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reasons: list[str] = []
        self.tell: Callable[[str], None] = lambda reason: None

    @cached_property
    def shares(self) -> tuple[int, int]:
        """(processes that have other data each, this one's rank among them)."""
        found = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return found["num_replicas"], found["rank"]

    @cached_property
    def seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))  # of lightning.pytorch.seed_everything

    def key(self, *numbers: int) -> int:
        return random_key(self.seed, *numbers)

    def epoch(self, stage: str) -> int:
        """What stands for the epoch of a loader: in a validation the batches trained so far, for it may be repeated."""
        if self.trainer.state.fn != "fit":
            return 0
        return self.trainer.current_epoch if stage == "train" else 1 + self.trainer.fit_loop.total_batch_idx

    def place(self, stage: str, loader: Any) -> int:
        """The number of a loader among those of its stage."""
        names = {"train": "train_dataloader", "val": "val_dataloaders", "test": "test_dataloaders"}
        flat = flattened(getattr(self.trainer, names[stage]))
        return next((i for i, one in enumerate(flat) if one is loader), 0)

    def made_in(self) -> int:
        """The epoch in which an uninterrupted run has asked for the loaders that it reads now."""
        every = self.trainer.reload_dataloaders_every_n_epochs
        return self.trainer.current_epoch // every * every if every else 0

    def seed_making(self, owner: Any) -> None:
        """Seeds what the methods draw by which a module or a data module makes its loaders."""
        for number, stage in enumerate(_STAGES):
            name = f"{stage}_dataloader"
            if callable(make := getattr(owner, name, None)):
                setattr(owner, name, wraps(make)(partial(self._make, make, number)))

    def _make(self, make: Callable[[], Any], number: int) -> Any:
        seed_all(self.key(MAKING, number, self.made_in()))
        return make()

    def cannot(self, reason: str) -> None:
        """Notes why a resumed run will not equal an uninterrupted one."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self.tell(reason)


def flattened(loaders: Any) -> list[Any]:
    """The loaders of whatever collection a Trainer holds them in."""
    return CombinedLoader(loaders).flattened


def _watched(loader: Any, seconds: float) -> Any:
    """A loader whose workers end the run where one of them dies, fails or hangs."""
    if getattr(loader, "num_workers", 0) == 0 and not hasattr(loader, "timeout_seconds"):
        return loader
    from boltlab.data.watch import watch

    return watch(loader, seconds)


def prepare(seam: Seam, process: Callable[[Any], Any], loader: Any) -> Any:
    """What Lightning takes for `loader`: for a plain one, an object of a class derived from its own.

    process: the strategy's own `process_dataloader`.
    """
    trainer = seam.trainer
    stage = "train" if trainer.training else "test" if trainer.testing else "val"
    left_alone = trainer.predicting or hasattr(loader, "state_dict")
    if left_alone or not hasattr(loader, "__dict__"):
        if not left_alone:
            seam.cannot(f"a {type(loader).__name__} is no DataLoader: nobody knows where it stands")
        return _watched(process(loader), seam.seconds)
    whole = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    if not whole:
        loader = _watched(process(loader), seam.seconds)
    reads = _Again if not whole or isinstance(loader.dataset, IterableDataset) else _Planned
    kind: Any = type(loader)
    facade: Any = object.__new__(_facade(kind))
    vars(facade).update(vars(loader))
    vars(facade)["_exact"] = reads(seam, stage, facade, whole)
    return process(facade) if whole else facade


class Exact:
    """First base of the class of a prepared loader; all else is the user's own class."""

    _exact: "_Reading"

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning asks for an iterator before it knows the epoch, and more than once.
        return self._exact.batches()

    def __len__(self) -> int:
        own = getattr(super(), "__len__", None)
        if own is None:
            raise TypeError(f"a {type(self).__name__} has no length")
        return self._exact.length(own)

    @property
    def _iterator(self) -> Any:  # Lightning ends persistent workers through it
        return getattr(self._exact.reader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if self._exact.reader is not None:
            self._exact.reader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        return self._exact.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exact.resume = dict(state)

    def resume_later(self, state: dict[str, Any]) -> bool:
        """Loads the state that Lightning hands over in mid-epoch only; whether the loader was read before, too early.

        It is not loaded twice.
        """
        reading = self._exact
        if reading.epoch == -1:
            self.load_state_dict(state)
        elif reading.epoch != reading.seam.epoch(reading.stage):
            self.load_state_dict(state)
            return True
        return False


@cache
def _facade(kind: Any) -> Any:
    return type(kind.__name__, (Exact, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Reading:
    """How a loader is read: a round is one iteration; Lightning makes several an epoch where loaders are cycled."""

    def __init__(self, seam: Seam, stage: str, loader: Any, whole: bool) -> None:
        self.seam, self.stage, self.loader, self.whole = seam, stage, loader, whole
        self.number, self.epoch, self.round, self.delivered, self.ended = 0, -1, 0, 0, False
        self.resume: dict[str, Any] = {}
        self.reader: Any = None
        self._seeds = torch.Generator()  # of the workers

    def key(self, kind: int, *numbers: int) -> int:
        """Of this loader; each process has keys of its own, but for the order, which all share."""
        rank = 0 if kind == ORDER else self.seam.shares[1]
        return self.seam.key(kind, rank, _STAGES.index(self.stage), self.number, *numbers)

    def batches(self) -> Iterator[Any]:
        """A round, from where the run was interrupted."""
        self.number = self.seam.place(self.stage, self.loader)
        epoch, resume = self.seam.epoch(self.stage), self.resume
        self.resume, start = {}, 0
        if resume.get("epoch") == epoch:
            self.round, start = resume["round"], resume["delivered"]
        else:
            self.round = self.round + self.ended if self.epoch == epoch else 0
        self.epoch, self.delivered, self.ended = epoch, start, False
        for batch in self.read(start, resume):
            self.delivered += 1
            yield batch
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        if self.resume:  # saved again before its first batch
            return dict(self.resume)
        return {"epoch": self.epoch, "round": self.round, "delivered": self.delivered}

    def length(self, own: Callable[[], int]) -> int:
        """own: the user's own `__len__`."""
        return own()

    def read(self, start: int, resume: dict[str, Any]) -> Iterator[Any]:
        raise NotImplementedError

    def seed_workers(self) -> None:
        """Before they start; those that persist start in any epoch and must be the same then."""
        persists = getattr(self.loader, "persistent_workers", False)
        self._seeds.manual_seed(self.key(WORKERS, *((0, 0) if persists else (self.epoch, self.round))))

    def make_reader(self, dataset: Any, **how: Any) -> Any:
        """A DataLoader with all else as the user's."""
        loader = self.loader
        kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
        if not kept.get("in_order", True) and loader.num_workers > 1:
            self.seam.cannot("in_order=False: batches come in the order in which workers finish them")
        made = {"collate_fn": loader.collate_fn, "generator": self._seeds}
        return _watched(DataLoader(dataset, **{**kept, **made, **how}), self.seam.seconds)


class _Planned(_Reading):
    """A map-style dataset: its batches are planned, and asked for with the keys of their draws."""

    def __init__(self, seam: Seam, stage: str, loader: Any, whole: bool) -> None:
        super().__init__(seam, stage, loader, whole)
        self.order = Order(loader, stage == "train", seam.shares, lambda *numbers: self.key(ORDER, *numbers))
        self.plan: list[Any] | None = None  # of the running round; None where it has no end
        self._asked: Iterator[Any] = iter(())  # what the reader is to read

    def length(self, own: Callable[[], int]) -> int:
        return self.order.length() if self.order.shared else own()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self.resume and self.plan is not None:
            state |= {"order": checksum(self.plan), "history": self.order.history}
        return state

    def read(self, start: int, resume: dict[str, Any]) -> Iterator[Any]:
        plan = self.order.plan(self.epoch, self.round, resume.get("history", []))
        if not self.order.pure and self.stage != "train":
            self.seam.cannot(f"the order of the {self.stage} loader depends on how often it was read")
        self.plan = list(plan) if self.order.sized else None
        saves = self.seam.shares[1] == 0  # whether a checkpoint holds the order of this process
        if start and self.plan and saves and resume.get("order") not in (None, checksum(self.plan)):
            self.seam.cannot(f"the order of the {self.stage} loader is another one than before the interruption")
        rest: Iterator[Any] = islice(plan if self.plan is None else self.plan, start, None)
        # A batch goes to the same worker as in a run without a break.
        blanks = start % self.loader.num_workers if self.loader.num_workers else 0
        key = self.key(DATA, self.epoch, self.round)
        keyed = ((random_key(key, n), batch) for n, batch in enumerate(rest, start))
        self._asked = chain([(None, ())] * blanks, keyed)
        self.seed_workers()
        if self.reader is None:
            self.reader = self._make()
        yield from islice(self.reader, blanks, None)

    def _make(self) -> Any:
        loader = self.loader
        asked = {"sampler": self, "batch_size": None} if loader.batch_sampler is None else {"batch_sampler": self}
        collate = loader.collate_fn
        if loader.num_workers > 1:  # the plan may begin with blanks
            collate = partial(collated, collate)
        return self.make_reader(Seeded(loader.dataset, loader.collate_fn), collate_fn=collate, **asked)

    def __iter__(self) -> Iterator[Any]:
        return self._asked


class _Again(_Reading):
    """An IterableDataset, or a class that iterates by itself: after an interruption the round is read again."""

    def read(self, start: int, resume: dict[str, Any]) -> Iterator[Any]:
        generators, iterator = Generators(vars(self.loader).values()), None
        for n in count():
            key = self.key(DATA, self.epoch, self.round, n)
            seed_all(key)
            generators.seed(key)
            iterator = self._begin() if iterator is None else iterator
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if n >= start:
                yield batch

    def _begin(self) -> Iterator[Any]:
        if not self.whole:
            return super(Exact, self.loader).__iter__()  # type: ignore[misc]
        self.seed_workers()
        loader = self.loader
        how = {} if loader.batch_size is None else {"drop_last": loader.drop_last}
        # Workers that persist would draw on from where they stand.
        self.reader = self.make_reader(loader.dataset, batch_size=loader.batch_size, persistent_workers=False, **how)
        return iter(self.reader)
