"""From indices to batches: made whole in memory, by threads from files, or by worker processes."""

import os
import warnings
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from boltlab.data.samplers import EvalSampler, TrainSampler, own_random_state, random_key
from boltlab.data.watch import watch
from boltlab.ground.errors import DataError

# What is made at once in memory: so much that the calls cost little beside the bytes, so little that it stays in cache.
CHUNK_BYTES_CPU = 2 << 20
CHUNK_BYTES_ACCELERATOR = 64 << 20
PIECE = 16  # samples that a thread makes at a time

Made = tuple[Any, Any, list[str]]  # x, y, messages of unreadable samples


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(eq=False, repr=False)
class TensorData(Dataset[Any]):
    """A split in memory: `x` [N, ...] and `labels` [N], fetched by whole batches, on the device where they stand."""

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.labels[index]

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.x.device.type != "cpu":
            indices = indices.to(self.x.device, non_blocking=True)
            return self.x.index_select(0, indices), self.labels.index_select(0, indices)
        # numpy copies rows on this thread; torch starts all its threads, which stall where the machine is busy.
        where = indices.numpy()
        return torch.from_numpy(self.x.numpy().take(where, axis=0)), torch.from_numpy(self.labels.numpy().take(where))

    def pixels(self, index: int) -> np.ndarray:
        """One image, uint8 [H,W,C]."""
        return self.x[index].permute(1, 2, 0).numpy()

    def subset(self, indices: Tensor) -> "TensorData":
        return TensorData(self.x[indices], self.labels[indices])

    def to(self, device: torch.device) -> "TensorData":
        return TensorData(self.x.to(device), self.labels.to(device))


class Batches(Dataset[Any]):
    """Makes the batch (epoch, indices) as (x, y, messages of unreadable samples), the same wherever it is made.

    A data set in memory (`TensorData`) is taken by whole batches. Of any other the samples `source[index] -> (x, y)`
    are taken one by one; what they draw from torch's default CPU generator follows (seed, epoch, index).
    """

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    @property
    def note(self) -> str:
        """What a user should know of how the batches are made."""
        return ""

    @property
    def whole(self) -> bool:
        """Whether a batch costs a few calls, however many samples it has."""
        return isinstance(self.source, TensorData)

    @cached_property
    def labels_checksum(self) -> int:
        """Of the labels of all samples, in their order: it tells whether a data set is still the same."""
        return zlib.crc32(np.ascontiguousarray(self.source.labels.cpu().numpy()).tobytes())

    @property
    def threads(self) -> bool:
        """Whether threads can share the work: where code of Python's own runs for each sample they cannot."""
        return self.whole

    def __getitem__(self, batch: tuple[int, Tensor]) -> Made:
        if not isinstance(batch, tuple):
            raise TypeError("boltlab's samplers were replaced: the Trainer needs use_distributed_sampler=False")
        return self.make(*batch)

    def make(self, epoch: int, indices: Tensor) -> Made:
        if isinstance(self.source, TensorData):
            return *self.source.take(indices), []
        return self._one_by_one(epoch, indices)[:3]

    def _one_by_one(self, epoch: int, indices: Tensor) -> tuple[Any, Any, list[str], Tensor]:
        """The samples that can be read, the messages of the others, and which of `indices` could be read."""
        samples, problems, kept = [], [], []
        with own_random_state() as seed_random_state:
            for index in indices.tolist():
                seed_random_state(random_key(self.seed, epoch, index))
                try:
                    samples.append(self.source[index])
                    kept.append(index)
                except DataError as error:
                    problems.append(str(error))  # as a value: raised in a worker it would carry a traceback as text
        x, y = default_collate(samples) if samples else (None, None)
        return x, y, problems, torch.tensor(kept, dtype=torch.int64)


@dataclass(eq=False, repr=False)
class Loader:
    """Yields (x, y). Up to `max_bad_files` unreadable samples are skipped and listed; one more is a DataError.

    num_workers: 0 makes the batches where they are asked for; more are threads, or processes where each sample runs
        code of Python's own. Which and how many changes nothing in the batches.

    It is no torch DataLoader: that makes batches in the training thread or in processes alone, and its iterator costs
    more than a batch from memory. Lightning takes anything that has a length and yields batches, sets the epoch of its
    `sampler` and keeps its state in the checkpoints.
    """

    dataset: Batches
    sampler: TrainSampler | EvalSampler
    max_bad_files: int = 0
    num_workers: int = 0
    pin_memory: bool = False

    batch_sampler: ClassVar[None] = None  # Lightning asks
    timeout_seconds: ClassVar[float] = 300.0  # that a worker process may take for a batch; `watch` sets it

    def __post_init__(self) -> None:
        self.bad_files: set[str] = set()
        self._delivered = 0
        self._resume: dict[str, Any] = {}
        self._processes: DataLoader[Any] | None = None

    @property
    def batch_size(self) -> int:
        return self.sampler.batch_size

    def __len__(self) -> int:
        return len(self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: batches of it that were handed out, and how many samples a batch takes."""
        if self._resume:  # saved again before its first batch
            return dict(self._resume)
        sampler = self.sampler
        taken = sampler.batch_size * sampler.world_size if isinstance(sampler, TrainSampler) else 0
        return {
            "epoch": getattr(sampler, "epoch", 0),
            "delivered": self._delivered,
            "taken": taken,
            "samples": len(self.dataset),
            "labels": self.dataset.labels_checksum,
            "bad_files": sorted(self.bad_files),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration continues there, if it is one of the same epoch."""
        self.refuse_other_data(state)
        self.bad_files = set(state.get("bad_files", ()))
        self._resume = dict(state)

    def refuse_other_data(self, state: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the data are others than those that the state was taken with.
        """
        ours = {"samples": len(self.dataset), "labels": self.dataset.labels_checksum}
        for key, value in ours.items():
            if state.get(key, value) != value:
                what = f"{state[key]} training samples, now there are {value}" if key == "samples" else "other labels"
                raise DataError(f"the checkpoint was trained on {what}: resume_changed=restart_epoch resumes with them")

    def __iter__(self) -> Iterator[Any]:
        self._delivered = self._start()
        if self.num_workers == 0:
            made = self._here()
        else:
            made = self._by_threads() if self.dataset.threads else self._by_processes()
        with closing(made):
            for x, y, problems in made:
                self._delivered += 1
                for problem in problems:
                    self._skip(problem)
                if x is None and getattr(self.sampler, "world_size", 1) > 1 and isinstance(self.sampler, TrainSampler):
                    raise DataError("one process could read no sample of a batch, and cannot leave a step out alone")
                if x is not None:
                    yield (x.pin_memory(), y.pin_memory()) if self.pin_memory and x.device.type == "cpu" else (x, y)

    def _start(self) -> int:
        """Has the sampler start where the checkpoint stands, if that is in this epoch; returns the batches before."""
        resume, self._resume = self._resume, {}
        if not isinstance(self.sampler, TrainSampler):
            return 0
        same = resume.get("epoch") == self.sampler.epoch
        taken = self.sampler.batch_size * self.sampler.world_size
        if same and resume["delivered"] < len(self) and resume["taken"] != taken:
            raise DataError(
                f"the checkpoint stands in the middle of an epoch of {resume['taken']} samples a batch, and this"
                f" run takes {taken}: resume with the same data.batch_size, or with resume_changed=restart_epoch"
            )
        self.sampler.start = resume["delivered"] if same else 0
        return self.sampler.start

    def _here(self) -> Generator[Made, None, None]:
        fetches = iter(self.sampler)
        if not self.dataset.whole:
            yield from map(self.dataset.__getitem__, fetches)
            return
        for first in fetches:
            # Draws belong to samples, so several batches made at once are the same batches.
            some = [first, *islice(fetches, self._at_once(len(first[1])) - 1)]
            if len(some) == 1:
                yield self.dataset[first]
                continue
            x, y, _ = self.dataset[first[0], torch.cat([indices for _, indices in some])]
            sizes = [len(indices) for _, indices in some]
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
                yield part_x, part_y, []

    def _at_once(self, batch_size: int) -> int:
        x = self.dataset.source.x
        chunk = CHUNK_BYTES_CPU if x.device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
        return max(1, chunk // max(1, batch_size * x[0].nbytes))

    def _by_threads(self) -> Generator[Made, None, None]:
        waiting: deque[list[Future[Made]]] = deque()
        # Each of them alone: torch would start all cores' threads in every one. The training thread keeps its number.
        torch.get_num_threads()  # the training thread's number stands from now on
        pool = ThreadPoolExecutor(self.num_workers, "boltlab-loader", torch.set_num_threads, (1,))
        try:
            for epoch, indices in self.sampler:
                waiting.append([pool.submit(self.dataset.make, epoch, piece) for piece in indices.split(PIECE)])
                # Two batches ahead, and enough of them for every thread where batches are small.
                if len(waiting) > 2 and sum(map(len, waiting)) >= 3 * self.num_workers:
                    yield self._joined([piece.result() for piece in waiting.popleft()])
            while waiting:
                yield self._joined([piece.result() for piece in waiting.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    def _joined(self, pieces: list[Made]) -> Made:
        problems = [problem for piece in pieces for problem in piece[2]]
        good = [piece for piece in pieces if piece[0] is not None]
        if len(good) < 2:
            return *(good[0][:2] if good else (None, None)), problems
        return torch.cat([x for x, _, _ in good]), torch.cat([y for _, y, _ in good]), problems

    def _by_processes(self) -> Generator[Made, None, None]:
        if self._processes is None:
            processes = DataLoader(
                self.dataset,
                sampler=self.sampler,
                batch_size=None,  # the sampler makes the batches
                collate_fn=_as_it_is,
                generator=torch.Generator().manual_seed(0),  # or each epoch would draw from the global random state
                num_workers=self.num_workers,
                persistent_workers=True,
            )
            self._processes = watch(processes, self.timeout_seconds)
        yield from self._processes

    def _skip(self, problem: str) -> None:
        if problem in self.bad_files:
            return
        self.bad_files.add(problem)
        count, most = len(self.bad_files), self.max_bad_files
        if most == 0:
            raise DataError(f"{problem}\n(data.max_bad_files=N skips up to N such files)")
        if count > most:
            listed = "\n".join(f"  {message}" for message in sorted(self.bad_files)[:20])
            raise DataError(f"more than data.max_bad_files={most} unreadable files:\n{listed}")
        warnings.warn(f"skipped ({count} of at most {most}): {problem}", stacklevel=3)


def _as_it_is(batch: Any) -> Any:
    return batch
