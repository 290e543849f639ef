"""Small data and Lightning runs for the tests of models."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    """The same fixed samples for every split."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 8) -> None:
        super().__init__()
        self.x, self.y, self.batch_size = x, y, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def class_counts(self, split: str) -> Tensor:
        return torch.bincount(self.y)


@pytest.fixture
def data() -> type[Data]:
    return Data


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., L.Trainer]:
    """Trainer on one CPU process without anything that writes."""

    def make(**arguments: Any) -> L.Trainer:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
        return L.Trainer(**{"accelerator": "cpu", "default_root_dir": tmp_path, "max_epochs": 1, **quiet, **arguments})

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/models" in item.path.as_posix():
            # Said by Lightning, not of our code.
            item.add_marker(pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have many workers.*"))
            item.add_marker(pytest.mark.filterwarnings("ignore:.*number of training batches.*is smaller than.*"))
