"""Plain DataLoaders in every form: workers, samplers, collections, generators, iterable datasets."""

import random
from collections.abc import Iterator

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

N, VAL = 54, 18


class Samples(Dataset):
    """Draws from all three global generators."""

    def __init__(self, count=N, seed=0):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        self.bias = 0.0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        drawn = torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.x[index] + 0.01 * drawn + self.bias, index


class Own(Samples):
    """Draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.rng, self.random = np.random.default_rng(3), random.Random(3)
        self.parts = {"torch": torch.Generator().manual_seed(3)}

    def __getitem__(self, index):
        drawn = self.rng.random() + self.random.random() + float(torch.rand((), generator=self.parts["torch"]))
        return self.x[index] + 0.1 * drawn, index


class Stream(IterableDataset):
    """Without length; worker processes take turns."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(first, N, step):
            yield torch.randn(6) + random.random() + float(np.random.rand()), index  # noqa: NPY002


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield int(torch.randint(N, ()))


class Buckets(Sampler):
    """Batches of its own: draws from numpy and counts its epochs itself."""

    def __init__(self, own=None):
        self.epoch, self.own = 0, own

    def __len__(self):
        return 7

    def __iter__(self):
        self.epoch += 1
        order = (self.own or np.random).permutation(N)
        order = np.roll(order, self.epoch)
        yield from ([int(i) for i in order[k * 7 : k * 7 + 7]] for k in range(7))


class Subclass(DataLoader):
    def twice(self):
        return 2 * len(self)


class Batches:
    """No DataLoader, and without a length."""

    def __iter__(self):
        for _ in range(7):
            yield [torch.randn(8, 6) + random.random(), torch.arange(8)]


class Iterating(DataLoader):
    def __iter__(self) -> Iterator:
        for batch in super().__iter__():
            yield [batch[0] + 0.01 * torch.rand(()), batch[1]]


def collate(items):
    x = torch.stack([x for x, _ in items])
    return x + 0.1 * torch.rand(()) + random.random(), torch.tensor([i for _, i in items])


def remember(worker):
    get_worker_info().dataset.bias = (torch.initial_seed() % 1000) / 1000


class Both(Dataset):
    """Batches are made by the dataset: `batch_size=None` with a sampler of batches."""

    def __init__(self):
        self.inner = Samples()

    def __len__(self):
        return N

    def __getitem__(self, indices):
        indices = [indices, (indices + 1) % N] if isinstance(indices, int) else indices
        pairs = [self.inner[i] for i in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([i for _, i in pairs])


def weights():
    return torch.arange(1.0, N + 1)


FORMS = {
    "shuffle": lambda w: DataLoader(Samples(), 8, shuffle=True, num_workers=w),
    "persistent": lambda w: DataLoader(Samples(), 8, shuffle=True, num_workers=w, persistent_workers=w > 0),
    "spawn": lambda w: DataLoader(
        Samples(), 8, shuffle=True, num_workers=w, multiprocessing_context="spawn" if w else None
    ),
    "weighted": lambda w: DataLoader(Samples(), 8, sampler=WeightedRandomSampler(weights(), N), num_workers=w),
    "weighted, own generator": lambda w: DataLoader(
        Samples(), 8, sampler=WeightedRandomSampler(weights(), N, generator=torch.Generator().manual_seed(5))
    ),
    "subset": lambda w: DataLoader(Samples(), 8, sampler=SubsetRandomSampler(range(40))),
    "drop_last": lambda w: DataLoader(Samples(), 8, shuffle=True, drop_last=True, num_workers=w),
    "generator": lambda w: DataLoader(
        Samples(), 8, shuffle=True, generator=torch.Generator().manual_seed(7), num_workers=w
    ),
    "replacement": lambda w: DataLoader(
        Samples(), 8, sampler=RandomSampler(range(N), replacement=True, num_samples=60), num_workers=w
    ),
    "buckets": lambda w: DataLoader(Samples(), batch_sampler=Buckets(), num_workers=w),
    "buckets, own generator": lambda w: DataLoader(Samples(), batch_sampler=Buckets(np.random.default_rng(4))),
    "collate draws": lambda w: DataLoader(Samples(), 8, shuffle=True, collate_fn=collate, num_workers=w),
    "own generators": lambda w: DataLoader(Own(), 8, shuffle=True, num_workers=w),
    "worker_init_fn": lambda w: DataLoader(Samples(), 8, shuffle=True, num_workers=w, worker_init_fn=remember),
    "no batches": lambda w: DataLoader(Both(), batch_size=None, shuffle=True, num_workers=w),
    "no batches, batching sampler": lambda w: DataLoader(
        Both(), batch_size=None, sampler=BatchSampler(RandomSampler(range(N)), 8, False), num_workers=w
    ),
    "endless": lambda w: DataLoader(Samples(), 8, sampler=Endless(), num_workers=w),
    "stream": lambda w: DataLoader(Stream(), 8, num_workers=w),
    "stream, persistent": lambda w: DataLoader(Stream(), 8, num_workers=w, persistent_workers=w > 0),
    "subclass": lambda w: Subclass(Samples(), 8, shuffle=True, num_workers=w),
    "own __iter__": lambda w: Iterating(Samples(), 8, shuffle=True, num_workers=w),
    "own class": lambda w: Batches(),
    "list": lambda w: [DataLoader(Samples(), 8, shuffle=True), DataLoader(Samples(20, 2), 7, shuffle=True)],
    "dict, max_size_cycle": lambda w: CombinedLoader(_two(w), "max_size_cycle"),
    "dict, min_size": lambda w: CombinedLoader(_two(w), "min_size"),
    "dict, max_size": lambda w: CombinedLoader(_two(w), "max_size"),
    "pinned, timeout": lambda w: DataLoader(Samples(), 8, shuffle=True, num_workers=w, timeout=60 if w else 0),
}


def _two(w):
    other = DataLoader(Samples(20, 2), 7, shuffle=True, num_workers=w)
    return {"a": DataLoader(Samples(), 8, shuffle=True, num_workers=w), "b": other}


class Form(L.LightningDataModule):
    """`draws`: `train_dataloader` itself draws a subset whenever it is asked."""

    def __init__(self, form: str = "shuffle", num_workers: int = 0, val: str = "one", draws: bool = False):
        super().__init__()
        self.form, self.num_workers, self.val, self.draws = form, num_workers, val, draws

    def train_dataloader(self):
        if self.draws:
            chosen = torch.randperm(N)[:40].tolist()
            return DataLoader(torch.utils.data.Subset(Samples(), chosen), 8, shuffle=True)
        return FORMS[self.form](self.num_workers)

    def val_dataloader(self):
        one = DataLoader(Samples(VAL, 1), 8, num_workers=self.num_workers)
        forms = {
            "one": lambda: one,
            "several": lambda: [one, DataLoader(Samples(VAL, 3), 5, shuffle=True)],
            "sequential": lambda: CombinedLoader([one, DataLoader(Samples(VAL, 3), 5)], "sequential"),
            "shuffled": lambda: DataLoader(Samples(VAL, 1), 8, sampler=RandomSampler(range(VAL))),
            "sorted": lambda: DataLoader(Samples(VAL, 1), 8, sampler=SequentialSampler(range(VAL))),
        }
        return forms[self.val]()

    test_dataloader = val_dataloader


class Numbers(L.LightningDataModule):
    """The numbers from 0; `form` says how they are loaded."""

    def __init__(self, train: int = 67, val: int = 31, batch_size: int = 8, form: str = "shuffle"):
        super().__init__()
        self.train, self.val, self.batch_size, self.form = train, val, batch_size, form

    def train_dataloader(self):
        data = TensorDataset(torch.arange(float(self.train))[:, None])
        forms = {
            "shuffle": lambda: DataLoader(data, self.batch_size, shuffle=True),
            "drop_last": lambda: DataLoader(data, self.batch_size, shuffle=True, drop_last=True),
            "own batches": lambda: DataLoader(data, batch_sampler=Buckets()),
            "endless": lambda: DataLoader(data, self.batch_size, sampler=Endless()),
            "shares itself": lambda: DataLoader(
                data, self.batch_size, sampler=DistributedSampler(data, seed=5) if _processes() > 1 else None
            ),
            "in any order": lambda: DataLoader(data, self.batch_size, num_workers=2, in_order=False),
            "numbers": lambda: [torch.tensor([[float(i)]]) for i in range(self.train)].__iter__(),
            "fed": lambda: DataLoader(data, self.batch_size, sampler=self.sampler),
        }
        return forms[self.form]()

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(float(self.val))[:, None]), self.batch_size)


def _processes():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class Fed(Sampler):
    """What the training has told it decides the order."""

    def __init__(self, count):
        self.count, self.told = count, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([(i + self.told) % self.count for i in range(self.count)])


class Feeding(Numbers):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.sampler = Fed(self.train)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.sampler.told += self.trainer.training
        return batch
