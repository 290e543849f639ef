"""What a training step costs besides its arithmetic: calls, looks at values on the device."""

import os
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from boltlab.callbacks.overhead import STEP_HOOKS, FetchClock, spare
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.training.trainer import make_trainer as make_train_trainer


class Fetches(pl.LightningDataModule):
    """50 random batches in memory; calls `at` with the number of each before it is given out."""

    task, num_classes, input_shape, class_names = "classification", 10, (1, 28, 28), tuple("0123456789")

    def __init__(self, at, device="cpu"):
        super().__init__()
        self.at, self.device = at, device

    def __len__(self):
        return 50

    def __iter__(self):
        x, y = torch.randn(64, 1, 28, 28, device=self.device), torch.randint(10, (64,), device=self.device)
        for number in range(50):
            self.at(number)
            yield x, y

    def state_dict(self):  # as the engine's loaders, which are taken as they are
        return {}

    def load_state_dict(self, state): ...

    def train_dataloader(self):
        return self

    val_dataloader = train_dataloader


def fit(run_dir, at, *overrides, device="cpu"):
    quiet = ["experiment=mnist_mlp", "logger=csv", "test=false", "trainer.max_epochs=1", "precision=32"]
    quiet += ["trainer.limit_val_batches=0", "monitor=train_loss", "mode=min"]
    config = compose("train", [*quiet, *overrides]).config
    config.run_dir = str(run_dir)
    make_train_trainer(config).fit(build(config, "model"), datamodule=Fetches(at, device))


def test_a_step_takes_few_calls(run_dir):
    calls = {"call": 0, "c_call": 0}

    def count(frame, event, argument):
        if event in calls:
            calls[event] += 1

    def at(number):
        if number in (10, 40):  # three of these steps write a row
            sys.setprofile(count if number == 10 else None)

    try:
        fit(run_dir, at, "trainer.accelerator=cpu")
    finally:
        sys.setprofile(None)
    # 1,730 with nothing but Lightning, 7,450 with the settings of the most used template
    assert 200 < sum(calls.values()) / 30 < 1500, calls


def test_values_are_read_once_a_step_on_a_cpu_and_only_by_the_guard(run_dir):
    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.reads += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    mode = Count()

    def at(number):
        if number == 10:
            Count.reads = 0
            mode.__enter__()
        if number == 40:
            mode.__exit__(None, None, None)

    fit(run_dir, at, "trainer.accelerator=cpu", "~callbacks.nan_guard")
    assert Count.reads == 3  # the rows of metrics.csv, every ten steps
    Count.reads = 0
    fit(run_dir / "guarded", at, "trainer.accelerator=cpu")
    assert Count.reads == 3 + 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_does_not_wait_for_the_gpu(run_dir):
    def at(number):
        # From the step after one that writes a row to the next that does: the guard looks every ten steps too.
        if number in (21, 29):
            torch.cuda.set_sync_debug_mode("error" if number == 21 else "default")

    try:
        fit(run_dir, at, "trainer.accelerator=gpu", device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_hooks_that_somebody_wrote_are_still_called(make_trainer, tiny_module, tiny_data):
    called = set()

    class Listener(Callback):
        def on_before_backward(self, trainer, module, loss):
            called.add("callback")

    class Module(tiny_module):
        def setup(self, stage):
            spare(self.trainer, self)

        def on_after_backward(self):
            called.add("module")

    trainer = make_trainer(callbacks=[Listener()])
    module = Module()
    trainer.fit(module, datamodule=tiny_data())
    assert called == {"callback", "module"}
    assert [name for name in STEP_HOOKS if getattr(module, name) is not None] == ["on_after_backward"]
    assert type(trainer.profiler) is FetchClock


def test_without_a_gpu_optimizers_do_not_look_for_one(make_trainer, tiny_module, tiny_data, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spare(make_trainer(callbacks=[]), tiny_module())
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
