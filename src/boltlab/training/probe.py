"""What a step of a config costs, seen from inside a real fit that leaves nothing behind."""

import contextlib
import gc
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from torch.utils.flop_counter import FlopCounterMode

from boltlab.callbacks.summary import ModelSummary
from boltlab.config.build import build
from boltlab.config.locate import locate
from boltlab.data.memory import available_memory
from boltlab.ground.errors import UserError
from boltlab.ground.malloc import keep_freed_memory
from boltlab.training import plain
from boltlab.training.flops import synchronize
from boltlab.training.trainer import make_trainer

LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar, ModelSummary)
ENDLESS = 10**9


def quiet(config: DictConfig, folder: str) -> DictConfig:
    """A copy of a training's config that writes into `folder` only, prints nothing, validates nothing and has no limit.

    Callbacks that do none of that stay, and so does metrics.csv: they are part of what a step costs.
    """
    copy = OmegaConf.create(OmegaConf.to_container(config))
    assert isinstance(copy, DictConfig)
    copy.run_dir = folder
    copy.logger = {name: node for name, node in (copy.logger or {}).items() if name == "metrics"}
    kinds = {name: locate(node["_target_"]) for name, node in (copy.callbacks or {}).items()}
    silent = [name for name, kind in kinds.items() if not (inspect.isclass(kind) and issubclass(kind, LEFT_OUT))]
    copy.callbacks = {name: copy.callbacks[name] for name in silent}
    unset = ("min_epochs", "min_steps", "max_time", "limit_train_batches", "val_check_interval", "profiler")
    none = ("limit_val_batches", "overfit_batches", "num_sanity_val_steps", "reload_dataloaders_every_n_epochs")
    off = ("fast_dev_run", "enable_checkpointing", "enable_progress_bar")
    settled = {**dict.fromkeys(unset), **dict.fromkeys(none, 0), **dict.fromkeys(off, False)}
    copy.trainer = {**copy.trainer, **settled, "default_root_dir": folder, "max_epochs": 1, "max_steps": -1}
    return copy


def fit(config: DictConfig, batches: Callable[[Any, Any, Any], Iterator[Any]]) -> None:
    """Fits the config's model on what `batches(trainer, model, loader)` yields, until that returns.

    Lightning sets everything up, as in a training. `loader` is the config's own train loader. All learning rates are 0,
    so that no number of steps on one batch makes the loss grow without bounds: a step costs the same.
    """
    keep_freed_memory()  # as every training does
    with tempfile.TemporaryDirectory() as folder:
        _fit(quiet(config, folder), batches)
        gc.collect()  # ends the loader's workers and frees the device for what comes next


def _fit(config: DictConfig, batches: Callable[[Any, Any, Any], Iterator[Any]]) -> None:
    pl.seed_everything(config.seed, verbose=False)
    data, model = build(config, "data"), build(config, "model")
    if not model.automatic_optimization:
        raise UserError(f"{type(model).__name__} optimizes manually: its steps cannot be timed apart from one another")
    plain.need("a measured fit", model, data, "training_step", "train_dataloader")
    if config.get("init_from"):  # a learning rate is searched for these weights
        from boltlab.training import init_from

        init_from.initialize(model, config)
    trainer = make_trainer(config)
    own = (data if plain.has(data, "train_dataloader") else model).train_dataloader

    data.train_dataloader = lambda: _Feed(trainer, batches(trainer, model, _one(own())))
    with contextlib.suppress(_Enough), get_console().capture():  # what a fit says of itself is not asked for here
        try:
            trainer.fit(model, datamodule=data)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None


def _one(loader: Any) -> Any:
    """A loader of whole batches: several loaders as the one that Lightning makes of them."""
    if isinstance(loader, (dict, list, tuple)):
        loader = CombinedLoader(loader, "max_size_cycle")
    return _Combined(loader) if isinstance(loader, CombinedLoader) else loader


class _Combined:
    """The batches of a CombinedLoader, without their numbers."""

    def __init__(self, loader: CombinedLoader) -> None:
        self.loader, self.num_workers = loader, 0
        parts = [getattr(part, "dataset", None) for part in loader.flattened]
        self.dataset = max(parts, key=len) if all(hasattr(part, "__len__") for part in parts) else None  # type: ignore[arg-type]

    def __len__(self) -> int:
        iter(self.loader)  # else it does not know
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, *_ in self.loader)


class _Enough(Exception):
    """Ends a fit from inside: the end of an epoch would ask for validation metrics."""


class _Feed:
    """A train loader for one endless epoch, in which nothing changes a learning rate: all are set to 0."""

    def __init__(self, trainer: Any, batches: Iterator[Any]) -> None:
        self.trainer, self.batches = trainer, batches

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        self.trainer.strategy.lr_scheduler_configs.clear()
        yield from self.batches
        raise _Enough


class Step:
    """The bare training step: `training_step`, backward, clipping, optimizer, without loop and callbacks."""

    def __init__(self, trainer: Any, model: pl.LightningModule) -> None:
        self.trainer, self.model, self.optimizer = trainer, model, trainer.optimizers[0]
        self.scaler = getattr(trainer.precision_plugin, "scaler", None) or torch.amp.GradScaler(enabled=False)

    def __call__(self, batch: Any) -> torch.Tensor:
        loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        if value := self.trainer.gradient_clip_val:
            self.scaler.unscale_(self.optimizer)
            self.model.clip_gradients(self.optimizer, value, self.trainer.gradient_clip_algorithm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: Any) -> torch.Tensor:
        """What `training_step` gives for a batch on the device.

        Raises:
            UserError: it gives no loss.
        """
        self.trainer._logger_connector.on_batch_start(batch)  # `self.log` asks for the number of samples
        self.model._current_fx_name = "training_step"  # and for the hook that it stands in
        takes_number = len(inspect.signature(self.model.training_step).parameters) > 1
        output = self.trainer.strategy.training_step(*((batch, 0) if takes_number else (batch,)))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            raise UserError(f"{type(self.model).__name__}.training_step returned no loss: there is no step to measure")
        return loss

    def seconds(self, batch: Any, at_least: float) -> float:
        """Mean time of a step, after a first one, over that many seconds and two steps."""
        self(batch)
        synchronize(self.model.device)
        start, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - start < at_least:
            self(batch)
            steps += 1
        synchronize(self.model.device)
        return (time.perf_counter() - start) / steps

    def activation_bytes(self, batch: Any) -> int:
        """What the forward pass keeps for the backward pass, weights left out: every storage once, not compiled."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.compiler.set_stance("force_eager"), hooks:
            loss = self.loss(batch)
        del loss  # until here it kept the storages, so no address was used twice
        return sum(kept.values())

    def flops(self, batch: Any) -> int:
        """FLOPs of the forward and the backward pass, not compiled."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.loss(batch).backward()
        self.optimizer.zero_grad()
        return int(counter.get_total_flops())

    def state_bytes(self) -> dict[str, Any]:
        """Of weights and gradients, and of the optimizer's state as it stands, so after a first step."""
        weights = list(self.model.parameters())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "weights": sum(p.nbytes for p in weights),
            "gradients": sum(p.nbytes for p in weights if p.requires_grad),
            "optimizer": sum(value.nbytes for value in states if isinstance(value, torch.Tensor)),
        }


def endless(loader: Any) -> Iterator[Any]:
    """The loader's batches, epoch after epoch."""
    while True:
        count = 0
        for batch in loader:
            count += 1
            yield batch
        if not count:
            raise UserError("the train loader gives no batch")


def to_device(trainer: Any, batch: Any) -> Any:
    """A loader's batch as the step gets it: on the device, normalized."""
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def reset_peak_memory(device: torch.device) -> None:
    """Begins to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that tensors took at most; None where nothing counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get on the device; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return available_memory()
