"""A net that trains in milliseconds, its data, and the shipped YAMLs composed without the rest of the project."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from boltlab.config import sources
from boltlab.training.trainer import make_trainer as of_config

CONFIGS = sources.CONFIG_DIR

ROOT = f"""
hydra:
  searchpath: ["file://{CONFIGS}"]
defaults: [_self_, trainer: cpu, callbacks: default, logger: [csv, wandb], debug: null]
precision: "32-true"
timeout_seconds: 300
monitor: val_acc
mode: max
name: null
tags: []
log_dir: ???
run_dir: ${{log_dir}}/run
test: true
data: {{num_workers: 0}}
"""


class TinyData(pl.LightningDataModule):
    """Four classes that one linear layer tells apart; 64 samples a split."""

    task = "classification"
    input_shape = (1, 4, 4)
    class_names = ("a", "b", "c", "d")
    num_classes = 4

    def __init__(self, samples: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.samples = samples
        self.batch_size = batch_size

    def loader(self, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(self.samples) % 4
        x = torch.randn(self.samples, 16, generator=generator) * 0.3
        x[torch.arange(self.samples), y] += 2.0
        return DataLoader(TensorDataset(x.view(-1, 1, 4, 4), y), self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)


class TinyModule(pl.LightningModule):
    """Logs what the shipped modules log. ``val_metric`` replaces val_acc by a number for each epoch."""

    def __init__(self, lr: float = 0.1, val_metric: Callable[[int], float] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 4)
        )
        self.lr = lr
        self.val_metric = val_metric
        self.sums = {"train": [0.0, 0, 0], "val": [0.0, 0, 0], "test": [0.0, 0, 0]}

    def step(self, batch: list[Tensor], split: str) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        output = self.net(x)
        loss = nn.functional.cross_entropy(output, y)
        sums = self.sums[split]
        sums[0] += loss.item() * len(y)
        sums[1] += int((output.argmax(1) == y).sum())
        sums[2] += len(y)
        return loss, {"output": output, "target": y}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss, _ = self.step(batch, "train")
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train_loss_step", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self.step(batch, "val")[1]

    def test_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self.step(batch, "test")[1]

    def log_epoch(self, split: str) -> None:
        loss, correct, samples = self.sums[split]
        accuracy = correct / samples
        if split == "val" and self.val_metric:
            accuracy = self.val_metric(self.current_epoch)
        self.log_dict({f"{split}_loss": loss / samples, f"{split}_acc": accuracy})
        self.sums[split] = [0.0, 0, 0]

    def on_train_epoch_end(self) -> None:
        self.log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self.log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self.log_epoch("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture
def tiny_module() -> type[TinyModule]:
    return TinyModule


@pytest.fixture
def tiny_data() -> type[TinyData]:
    return TinyData


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., DictConfig]:
    """The shipped groups under a root of the test: ``composed("callbacks=[best]", …)``."""

    def make(*overrides: str) -> DictConfig:
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        (root / "root.yaml").write_text(ROOT)
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(root), version_base="1.3"):
            return compose("root", overrides=[f"log_dir={tmp_path}", *overrides])

    return make


@pytest.fixture
def make_trainer(composed: Callable[..., DictConfig]) -> Callable[..., pl.Trainer]:
    """A Trainer from the shipped YAMLs: short, on the CPU, with the callbacks and loggers that the overrides name; with
    `callbacks`, Lightning's own and these alone."""

    def make(*overrides: str, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
        short = ["trainer.max_epochs=2", "trainer.log_every_n_steps=2"]
        chosen = [] if callbacks is None else ["callbacks=none", "logger=csv", "trainer.enable_checkpointing=false"]
        config = composed(*short, *chosen, *overrides)
        if callbacks is None:
            return of_config(config)
        loggers = [instantiate(node) for node in config.logger.values()]
        return instantiate(config.trainer, callbacks=callbacks, logger=loggers)

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
