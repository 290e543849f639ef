"""The one data module base: splits, sample order, loaders.

A data set is a subclass with one method, `load(split)`, which returns `TensorData`, or any dataset with `len(d)`,
`d[i] -> (x, y)` and `d.labels` (int64 [N], or float32 [N] for regression). The arguments are dataclass fields, so a
subclass inherits them and its signature lists them all.

Randomness: the order of samples is a permutation of (seed, epoch), strided by rank; augmentation draws from
(seed, epoch, index). So the number of workers changes nothing, ranks differ and two runs are equal, and the global
random state is never touched. What a dataset of your own draws in `d[i]` must come from torch's default CPU generator,
as `torchvision.transforms.v2` does.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from boltlab.data.loader import Batches, Loader, TensorData, available_cores
from boltlab.data.samplers import EvalSampler, TrainSampler
from boltlab.data.splits import fold_problems, listed, split_off, take_fold, thin_out
from boltlab.ground.errors import DataError

Split = Literal["train", "val", "test"]

MAX_AUTO_WORKERS = 16
# Below this many samples in memory, starting workers costs more than they save.
MIN_SAMPLES_FOR_WORKERS = 20_000


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(LightningDataModule):
    """Base of all data modules. A loader yields (x, y): x [B, ...] and y int64 [B], or float32 [B] for regression.

    batch_size: samples per step over all processes together; the number of processes must divide it.
    num_workers: threads that make batches, or processes where the augmentation has no batch form. "auto" is one for
        each core of this process, 16 at the most, for files; for data in memory it is 0, or one core less if there are
        many samples to augment one by one.
    device_memory_share: of a GPU's free memory that a split in memory may take; one that takes more stays on the host.
    seed: of the order of samples and of augmentation.
    split_seed: of the boundary between train and val only: another `seed` keeps it, and it never moves test.
    val_fraction: share of the training samples set aside for validation, or their number if it is an int.
    folds, fold: cross-validation, with both: the samples that train and val share are divided into `folds` equal parts,
        stratified by class; part number `fold` (from 0) is val, the others are train, and `val_fraction` is not looked
        at. The division follows (split_seed, folds) alone. Data that bring their own validation set refuse it.
    max_samples: training samples kept after the split, for quick trials: a fixed part, stratified by class, of
        (split_seed, max_samples) alone. None, or more than there are, keeps all. Val and test stay whole.
    num_classes, class_names: "auto" where the data alone can tell; None in regression.
    sampler: "balanced" draws every class equally often, with replacement; an epoch keeps its length.
    """

    batch_size: int = 64
    num_workers: int | Literal["auto"] = "auto"
    seed: int = 0
    split_seed: int = 0
    val_fraction: float | int = 0.1
    folds: int | None = None
    fold: int | None = None
    max_samples: int | None = None
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    device_memory_share: float = 0.3
    num_classes: int | Literal["auto"] | None = None
    class_names: list[str] | Literal["auto"] | None = None

    # The arguments that tell these data from others of the class; a path means what it leads to.
    located_by: ClassVar[tuple[str, ...]] = ("path", "root", "name")

    task: Literal["classification", "regression"] = field(init=False, default="classification")
    test_split: Split = field(init=False, default="test")  # `eval split=val` sets it
    device: torch.device = field(init=False, default=torch.device("cpu"))  # where no Trainer says it
    on_load: Callable[[Split], None] | None = field(init=False, default=None)  # `train` records what was loaded
    replaced: bool = field(init=False, default=False)  # and says here that a run resumes with other data than before
    whole: bool = field(init=False, default=False)  # `eval` sets it: data not trained on are not divided
    # What was fitted on the training samples, tensors and plain values: every checkpoint holds it, and where it comes
    # from one, a `load` applies it instead of fitting anew.
    fitted: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._datasets: dict[Split, Any] = {}
        self._on_device: dict[Split, TensorData] = {}
        self._said = False
        self._divided = self._thinned = False
        self._never_validated: list[int] = []

    # What a subclass defines

    def load(self, split: Split) -> Any:
        """The split's dataset, as the file's head says; called once for each split in use.

        What train and val share is divided by `train_and_val`; a training set of its own is thinned out by `kept`.
        """
        raise NotImplementedError

    def files(self, split: Split) -> list[tuple[str, str]]:
        """(name, path) of each file that the split is read from; names tell them apart wherever the data lie."""
        return []

    def batches(self, split: Split, augment: bool) -> Batches:
        """What makes the split's batches."""
        return Batches(self.dataset(split), self.seed)

    # What Lightning and the commands call

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        problems = []
        for name in ("val_fraction", "test_fraction"):
            size = arguments.get(name)
            if (isinstance(size, float) and not 0 < size < 1) or (isinstance(size, int) and size < 1):
                problems.append((name, f"{size} is neither a fraction between 0 and 1 nor a number of samples"))
        share = arguments.get("device_memory_share")
        if isinstance(share, (int, float)) and not 0 <= share <= 1:
            problems.append(("device_memory_share", f"{share} is outside 0..1"))
        problems += fold_problems(arguments.get("folds"), arguments.get("fold"))
        at_least = {"batch_size": 1, "num_workers": 0, "max_bad_files": 0, "max_samples": 1, "max_pixels": 1}
        for name, least in at_least.items():
            number = arguments.get(name)
            if isinstance(number, int) and number < least:
                problems.append((name, f"{number} is less than {least}"))
        return problems

    def state_dict(self) -> dict[str, Any]:
        names = {"class_names": self.class_names} if isinstance(self.class_names, list) else {}
        return {"fitted": {**self.fitted, **names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was fitted; before the first split is loaded."""
        self.fitted = dict(state_dict.get("fitted") or {})
        if not isinstance(self.class_names, list) and isinstance(names := self.fitted.get("class_names"), list):
            self.class_names, self.num_classes = names, len(names)

    def setup(self, stage: str | None = None) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": (self.test_split,)}.get(stage or "", ()):
            self.dataset(split)  # type: ignore[arg-type]

    def dataset(self, split: Split) -> Any:
        """The split's dataset, loaded at the first call."""
        if split not in self._datasets:
            dataset = self.load(split)
            if len(dataset) == 0:
                raise DataError(f"the {split} split is empty")
            if split != "test":
                self._refuse_what_load_left_out(split)
            self._datasets[split] = dataset
            if self.on_load is not None:
                self.on_load(split)
        return self._datasets[split]

    def train_dataloader(self) -> Loader:
        batches = self.batches("train", augment=True)
        if self._never_validated and self._rank_and_world_size()[0] == 0:
            names = listed(self._never_validated, self._names_of_classes)
            print(f"classes without a validation sample: {len(self._never_validated)} ({names})", flush=True)
            self._never_validated.clear()  # shared by copies of this module
        return self._loader("train", self._train_sampler(batches), batches)

    def num_train_batches(self) -> int:
        """Training batches of an epoch on each process, however many of them are fetched at once."""
        return len(self._train_sampler(self.batches("train", augment=True)))

    def val_dataloader(self) -> Loader:
        return self.dataloader("val")

    def test_dataloader(self) -> Loader:
        return self.dataloader(self.test_split)

    def dataloader(self, split: Split, augment: bool = False) -> Loader:
        """Every sample of the split once, in its stored order; over several processes each sample on one of them."""
        rank, world_size = self._rank_and_world_size()
        batches = self.batches(split, augment)
        sampler = EvalSampler(len(batches), self._batch_size_per_process(world_size), rank, world_size)
        return self._loader(split, sampler, batches)

    def samples(self, split: Split, indices: list[int], augment: bool = False, epoch: int = 0) -> tuple[Any, Any]:
        """The samples of the split at `indices` as a batch, exactly as epoch number `epoch` would hold them."""
        x, y, problems = self.batches(split, augment)[epoch, torch.tensor(indices)]
        if problems:
            raise DataError("\n".join(problems))
        return x, y

    def class_counts(self, split: Split = "train") -> Tensor:
        """Samples of each class, int64 [num_classes]."""
        minlength: int = self.num_classes if isinstance(self.num_classes, int) else 0
        return torch.bincount(self.dataset(split).labels, minlength=minlength)

    # What a `load` divides by

    def train_and_val(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of train and val among the samples that they share, both sorted: by `val_fraction` or by `folds`.

        labels: of those samples, int64 [N] or float [N].
        """
        self._divided = True
        if self.whole:
            return torch.arange(len(labels)), torch.arange(len(labels))
        for name, message in fold_problems(self.folds, self.fold):
            raise DataError(f"data.{name}={getattr(self, name)} {message}")
        if self.folds is None or self.fold is None:
            train, val = split_off(labels, self.val_fraction, self.split_seed, self._names_of_classes)
        else:
            train, val = take_fold(labels, self.folds, self.fold, self.split_seed, self._names_of_classes)
        if not labels.is_floating_point():
            trained, validated = labels[train].unique(), labels[val].unique()
            self._never_validated = trained[~torch.isin(trained, validated)].tolist()
        return train[self.kept(labels[train])], val

    def three_splits(self, labels: Tensor, test_fraction: float | int) -> dict[Split, Tensor]:
        """Indices of train, val and test for data without splits of its own. No seed moves test."""
        if self.whole:
            every = self.train_and_val(labels)[0]
            return {"train": every, "val": every, "test": every}
        rest, test = split_off(labels, test_fraction, 0, self._names_of_classes)
        train, val = self.train_and_val(labels[rest])
        return {"train": rest[train], "val": rest[val], "test": test}

    def kept(self, labels: Tensor) -> Tensor:
        """Indices of the training samples, which have these labels, that `max_samples` keeps."""
        self._thinned = True
        if self.whole or self.max_samples is None or self.max_samples >= len(labels):
            return torch.arange(len(labels))
        return thin_out(labels, self.max_samples, self.split_seed)

    @property
    def _names_of_classes(self) -> list[str] | None:
        return self.class_names if isinstance(self.class_names, list) else None

    def _refuse_what_load_left_out(self, split: Split) -> None:
        name = type(self).__name__
        if self.whole:
            return
        if self.folds is not None and not self._divided:
            raise DataError(f"data.folds={self.folds}: the {split} split of {name} is not divided by train_and_val()")
        if self.max_samples is not None and split == "train" and not self._thinned:
            missing = "has no kept() or train_and_val() in its load()"
            raise DataError(f"data.max_samples={self.max_samples}: {name} {missing}")

    # Parts

    def _train_sampler(self, batches: Batches) -> TrainSampler:
        rank, world_size = self._rank_and_world_size()
        size = self._batch_size_per_process(world_size)
        shuffle = getattr(self.trainer, "overfit_batches", 0) == 0
        labels = batches.source.labels if self.sampler == "balanced" else None
        return TrainSampler(len(batches), size, self.seed, rank, world_size, shuffle, labels)

    def _loader(self, split: Split, sampler: TrainSampler | EvalSampler, batches: Batches) -> Loader:
        device = self.device if self.trainer is None else self.trainer.strategy.root_device
        if device.type == "cuda" and batches.whole:
            batches.source = self._placed(split, batches.source, device)
        num_workers = self._num_workers(batches)
        if batches.note and not self._said and self._rank_and_world_size()[0] == 0:
            self._said = True
            where = f"in {num_workers} processes" if num_workers else "while training waits"
            print(f"{batches.note}, {where}", flush=True)
        return Loader(batches, sampler, getattr(self, "max_bad_files", 0), num_workers, device.type == "cuda")

    def _placed(self, split: Split, data: TensorData, device: torch.device) -> TensorData:
        """The split on the GPU, where it takes no more than its share of what is free there."""
        if split not in self._on_device:
            free, _ = torch.cuda.mem_get_info(device)
            fits = data.x.nbytes + data.labels.nbytes <= self.device_memory_share * free
            self._on_device[split] = data.to(device) if fits else data
        return self._on_device[split]

    def _num_workers(self, batches: Batches) -> int:
        if self.num_workers != "auto":
            return 0 if batches.whole else self.num_workers
        cores = max(1, available_cores() // self._processes_here())
        if not isinstance(batches.source, TensorData):
            return min(cores, MAX_AUTO_WORKERS)
        worth_it = not batches.whole and len(batches) >= MIN_SAMPLES_FOR_WORKERS and cores > 2
        return min(cores - 1, MAX_AUTO_WORKERS) if worth_it else 0

    def _processes_here(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (self.trainer.num_devices if self.trainer else 1)

    def _batch_size_per_process(self, world_size: int) -> int:
        if self.batch_size % world_size:
            raise DataError(f"data.batch_size={self.batch_size} cannot be divided over {world_size} processes")
        return self.batch_size // world_size

    def _rank_and_world_size(self) -> tuple[int, int]:
        mesh = getattr(getattr(self.trainer, "strategy", None), "_device_mesh", None)
        if mesh is not None:  # the processes of a tensor-parallel group share their batches
            return mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1
