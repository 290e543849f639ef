"""Random numbers of steps, samples and orders: functions of where the training stands, so nothing has to be saved."""

import random
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

# What a key is for: keys of different kinds are independent.
ORDER, WORKERS, DATA, STEP, EVALUATION, HOOK, MAKING = range(7)

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CLOSED = (str, bytes, Tensor, np.ndarray, ModuleType, type, nn.Module, pl.Trainer, DataLoader)
_DEPTH, _WIDTH = 6, 64  # how far the search for generators goes


def seed_all(key: int, device: torch.device | None = None) -> None:
    """Seeds the global generators of torch (CPU and `device`), numpy and random with a 64-bit key.

    `torch.manual_seed` would seed every accelerator too, which takes a hundred times as long.
    """
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFF_FFFF)  # noqa: NPY002  (the code of users draws from it)
    random.seed(key)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(key)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(key)


class Generators:
    """The generators that objects hold in their attributes, containers, closures and bound methods.

    `seed` makes the next draws of each a function of the key and of the state in which the generator was found first,
    so that the seed that a user has chosen still counts. A copy in another process is given these first states.
    """

    _first: ClassVar[dict[int, tuple[Any, int]]] = {}  # by id; holds the generator, so that no other one gets its id

    def __init__(self, roots: Iterable[Any], firsts: list[int] | None = None) -> None:
        self.found = list(_walk(roots))
        self.firsts = firsts or [self._first.setdefault(id(g), (g, _state(g)))[1] for g in self.found]

    def seed(self, key: int) -> None:
        for generator, first in zip(self.found, self.firsts, strict=False):
            _seed(generator, key ^ (first * 0x9E37_79B9_7F4A_7C15 & 0xFFFF_FFFF_FFFF_FFFF))


def _walk(roots: Iterable[Any]) -> Iterator[Any]:
    of_all = (torch.default_generator, getattr(np.random.mtrand, "_rand", None), getattr(random, "_inst", None))
    seen: dict[int, Any] = {id(thing): thing for thing in of_all}
    todo = deque((root, 0) for root in roots)
    while todo:
        thing, depth = todo.popleft()
        if id(thing) in seen or thing is None:
            continue
        seen[id(thing)] = thing  # held, so that no later part gets the same id
        if isinstance(thing, _KINDS):
            yield thing
        elif depth < _DEPTH and not isinstance(thing, _CLOSED):
            todo.extend((part, depth + 1) for part in _parts(thing))


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())[:_WIDTH]
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return list(thing)[:_WIDTH]
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
    if isinstance(thing, CellType):
        try:
            return [thing.cell_contents]
        except ValueError:  # not filled yet
            return []
    slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in vars(kind).get("__slots__", ())]
    return [*list(getattr(thing, "__dict__", {}).values())[:_WIDTH], *slots]


def _state(generator: Any) -> int:
    """A number for the state of a generator: for one of torch the seed that it was given."""
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    if isinstance(generator, random.Random):
        return zlib.crc32(repr(generator.getstate()).encode())
    found = generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()
    with np.printoptions(threshold=1000):
        return zlib.crc32(repr(found).encode())


def _seed(generator: Any, key: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(key)
    elif isinstance(generator, random.Random):
        generator.seed(key)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(key).state
    else:
        generator.seed(key & 0xFFFF_FFFF)


class Seeded:
    """A map-style dataset whose samples are asked for by whole batches, each with the key of its draws.

    It seeds once a batch, in the process that reads the samples; torch collates them right after that, in the same
    process. All else is the dataset's: attributes are read and set there, also from a `worker_init_fn`.
    """

    def __init__(self, dataset: Any, collate: Any, firsts: list[int] | None = None) -> None:
        vars(self)["_seeded"] = (dataset, collate, Generators([dataset, collate], firsts))

    def __reduce__(self) -> Any:
        dataset, collate, generators = vars(self)["_seeded"]
        return Seeded, (dataset, collate, generators.firsts)

    @property  # type: ignore[misc]  # whoever looks at it, such as a worker_init_fn, finds the class that it knows
    def __class__(self) -> Any:
        return type(vars(self)["_seeded"][0])

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_seeded"][0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_seeded"][0], name, value)

    def __len__(self) -> int:
        return len(vars(self)["_seeded"][0])

    def __getitems__(self, asked: tuple[int | None, Any]) -> Any:
        key, indices = asked
        if key is None:
            return BLANK
        dataset = _begin(self, key)
        together = getattr(dataset, "__getitems__", None)
        return together(indices) if together else [dataset[index] for index in indices]

    def __getitem__(self, asked: tuple[int | None, Any]) -> Any:
        key, index = asked
        return BLANK if key is None else _begin(self, key)[index]


def _begin(seeded: Seeded, key: int) -> Any:
    dataset, _, generators = vars(seeded)["_seeded"]
    seed_all(key)
    generators.seed(key)
    return dataset


BLANK = object()  # stands for a batch that was delivered before the run was interrupted


def collated(collate: Any, samples: Any) -> Any:
    """What the loader's own `collate` makes of samples; a blank comes out as None."""
    return None if samples is BLANK else collate(samples)
