"""The tests of a LightningDataModule, by the first batches that a training reads."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from boltlab.config.build import build
from boltlab.data.base import DataModule
from boltlab.testing.base import ConfigTests, differing, digests
from boltlab.training import plain, probe
from boltlab.training.trainer import make_trainer

BATCHES = 3  # that are read of each split
SAMPLES = 2000  # of each split that are compared, at even distances
_SPLITS: Any = ("train", "val", "test")


class DataModuleTests(ConfigTests):
    """Tests of the LightningDataModule of a config. They read the first batches of each split as a training does."""

    @pytest.mark.parametrize("split", _SPLITS)
    def test_gives_batches(self, split: str, tmp_path: Path) -> None:
        """Each split gives a batch; one without a loader is skipped, but for `train`."""
        data, seen = self._read(tmp_path)
        if split != "train" and (lack := plain.lacks(f"{split}_dataloader", data)):
            pytest.skip(lack)
        assert any(path.startswith(split) for path in seen), f"{split}_dataloader gives no batch"

    def test_two_setups_give_equal_batches(self, tmp_path: Path) -> None:
        """Two objects from the same seed give the same first batches of each split."""
        found = differing(self._read(tmp_path)[1], self._read(tmp_path)[1])
        assert not found, f"two setups with the same seed give other batches: {', '.join(found[:8])}"

    def test_workers_do_not_change_the_batches(self, tmp_path: Path) -> None:
        """No worker and two workers give the same first batches of each split."""
        alone, two = (self._read(tmp_path, workers)[1] for workers in (0, 2))
        if (found := differing(alone, two)) and differing(alone, self._read(tmp_path, 0)[1]):
            pytest.skip("two setups differ without workers: see test_two_setups_give_equal_batches")
        assert not found, f"two workers give other batches than none: {', '.join(found[:8])}"

    def test_splits_do_not_overlap(self, tmp_path: Path) -> None:
        """No sample stands in two splits. Subsets of one dataset are compared by indices, all else by contents."""
        data, _ = self._read(tmp_path)
        sets = {split: _dataset(data, split) for split in _SPLITS if plain.has(data, f"{split}_dataloader")}
        same = all(isinstance(part, Subset) for part in sets.values())
        same = same and len({id(part.dataset) for part in sets.values()}) == 1
        found: dict[str, Any] = {split: part.indices if same else _samples(part) for split, part in sets.items()}
        if any(len(set(samples)) < len(samples) for samples in found.values()):
            pytest.skip("a split holds samples more than once: those of two splits cannot be told apart")
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            both = set(found.get(one, ())) & set(found.get(other, ()))
            assert not both, f"{len(both)} samples of {other} stand in {one} too"

    def _read(self, folder: Path, workers: int | None = None) -> tuple[Any, dict[str, str]]:
        """A data module after its setup, and digests of the first batches of each split that it has."""
        config = probe.quiet(self.composed(), str(folder))
        config.update({"callbacks": {}, "logger": {}})
        config.trainer.update({"limit_train_batches": BATCHES, "limit_test_batches": BATCHES})
        if workers is not None and "num_workers" in config.data:
            config.data.num_workers = workers
        pl.seed_everything(config.seed, verbose=False)
        data, listener, trainer = build(config, "data"), _Listener(), make_trainer(config)
        if workers is not None:
            prepare = trainer.strategy.process_dataloader
            trainer.strategy.process_dataloader = lambda loader: prepare(_with_workers(loader, workers))
        trainer.fit(listener, datamodule=data)
        trainer.limit_val_batches = BATCHES
        for split, read in (("val", trainer.validate), ("test", trainer.test)):
            if plain.has(data, f"{split}_dataloader"):
                read(listener, datamodule=data, verbose=False)
        return data, listener.seen


class _Listener(pl.LightningModule):
    """Notes the batches that it gets, and trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, str] = {}
        for split, step in zip(_SPLITS, ("training_step", "validation_step", "test_step"), strict=True):
            setattr(self, step, partial(self._see, split))

    def _see(self, split: str, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = f"{split} batch {batch_idx} of loader {dataloader_idx}: "
        self.seen |= {name + path: found for path, found in digests(batch).items()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def _with_workers(loader: Any, workers: int) -> Any:
    if isinstance(loader, DataLoader):  # with all that depends on the number of workers
        vars(loader).update(num_workers=workers, timeout=0, prefetch_factor=None, persistent_workers=False)
        vars(loader)["_DataLoader__multiprocessing_context"] = loader.multiprocessing_context if workers else None
    return loader


def _dataset(data: Any, split: Any) -> Any:
    own = isinstance(data, DataModule)
    dataset = data.dataset(split) if own else getattr(getattr(data, f"{split}_dataloader")(), "dataset", None)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        pytest.skip(f"the samples of {split} cannot be compared: its loader has no map-style dataset")
    return dataset


def _samples(dataset: Any) -> list[str]:
    return [str(digests(dataset[i])) for i in range(0, len(dataset), max(1, len(dataset) // SAMPLES))]
