"""What Lightning spends on every training step for nothing, and how a fit is spared it. No result changes by it.

For an MLP of 784-128-10 the hooks of a step cost more than its arithmetic: see benchmarks/loop.py.
"""

import inspect
import os
import time
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch import nn

# Called once or more a step, and empty where nobody overrides them.
STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
FETCH = "[_TrainingEpochLoop].train_dataloader_next"
_NOTHING = nullcontext()


class FetchClock(Profiler):
    """Times the fetching of training batches, which only a profiler is told of, and else does nothing, cheaply.

    Lightning's own way of doing nothing makes a generator at each of some thirty hooks a step. `around` is a profiler
    that is to go on as it would.
    """

    def __init__(self, around: Profiler | None = None) -> None:
        super().__init__()
        self.around = around
        self.fetch_start = 0.0  # when the latest fetch began, of time.perf_counter
        self.wait_seconds = 0.0  # of all fetches together

    def start(self, action_name: str) -> None:
        if action_name == FETCH:
            self.fetch_start = time.perf_counter()
        if self.around is not None:
            self.around.start(action_name)

    def stop(self, action_name: str) -> None:
        if self.around is not None:
            self.around.stop(action_name)
        if action_name == FETCH:
            self.wait_seconds += time.perf_counter() - self.fetch_start

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        return _NOTHING if self.around is None else self.around.profile(action_name)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Lightning sets this one 44 times a step, and torch would look for parameters and modules each time."""
    if name == "_current_fx_name":
        module.__dict__[name] = value
    else:
        nn.Module.__setattr__(module, name, value)


def spared() -> None:
    """To be called when a fit has ended: other fits in this process are as Lightning has them."""
    if vars(LightningModule).get("__setattr__") is _set:
        del LightningModule.__setattr__


def spare(trainer: Trainer, model: LightningModule) -> None:
    """To be called when a fit is set up."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is PassThroughProfiler:
        trainer.profiler = FetchClock()  # type: ignore[attr-defined]
    # Lightning passes over a hook that cannot be called; else it calls those of its base classes, which are empty.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for owner, base in ((model, LightningModule), *((callback, Callback) for callback in callbacks)):
        for name in STEP_HOOKS:
            if getattr(type(owner), name) is getattr(base, name) and name not in vars(owner):
                setattr(owner, name, None)
    vars(model).pop("configure_gradient_clipping", None)  # of an earlier fit
    inherited = type(model).configure_gradient_clipping is LightningModule.configure_gradient_clipping
    if trainer.gradient_clip_val is None and inherited:
        model.configure_gradient_clipping = None  # type: ignore[assignment]
    step: Any = type(model).training_step
    if type(step) is FunctionType and not hasattr(step, "__signature__"):  # Lightning asks for it at each step
        step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    if "__setattr__" not in vars(LightningModule):
        LightningModule.__setattr__ = _set  # type: ignore[assignment,method-assign]
    if not torch.cuda.is_available():
        # Set by Lightning's import; each step of a torch optimizer then looks for the driver anew.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
