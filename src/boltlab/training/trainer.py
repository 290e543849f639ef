"""The Trainer that a config describes."""

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.config.build import build
from boltlab.config.devices import process_count
from boltlab.ground import credentials


def make_trainer(config: DictConfig, adapt: Callable[[dict[str, Any]], None] | None = None, **arguments: Any) -> Any:
    """The Trainer that a config describes, with its callbacks, its loggers and our checkpoint files.

    adapt: changes the content of a checkpoint in place before a fit resumes from it.
    """
    import torch
    from lightning.pytorch.callbacks import ProgressBar

    from boltlab.training.loaders import Seam, prepare
    from boltlab.training.prepare import Prepare
    from boltlab.training.resume_state import Resume

    torch.set_float32_matmul_precision(config.get("float32_matmul_precision", "highest"))
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.15 in a way that torch warns of at every run; nothing here can change it.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
    for text in (
        "Checkpoint directory .* exists and is not empty",  # of a resumed run; its folder is locked
        "The `srun` command is available",  # of a machine with Slurm, whoever has started the processes
        ".*smaller than the logging interval",  # epoch values are logged whatever the interval is
    ):
        warnings.filterwarnings("ignore", text, UserWarning)
    callbacks = [build(config, f"callbacks.{name}") for name in config.get("callbacks") or {}]
    if config.trainer.get("enable_progress_bar") is False:  # Lightning refuses a progress callback then
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    seam = Seam(config.get("timeout_seconds", 300.0))
    callbacks.insert(0, Prepare(config.get("compile", False), config.get("channels_last", False)))
    callbacks.insert(0, Resume(seam, Path(config.run_dir) if config.get("run_dir") else None))
    if config.trainer.get("strategy", "auto") == "auto" and process_count(config) > 1:
        from lightning.pytorch.strategies import DDPStrategy

        timeout = timedelta(seconds=config.get("timeout_seconds", 300.0))
        arguments["strategy"] = DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)
    trainer = build(
        config,
        "trainer",
        callbacks=callbacks,
        logger=[build(config, f"logger.{name}") for name in config.get("logger") or {}],
        plugins=_plugins(config),
        **arguments,
    )
    _count(trainer)
    if trainer.precision != "32-true":
        from boltlab.training import precision

        precision.settle(trainer)
    # Signals are ours: Lightning's handler talks to the other processes from wherever the signal finds it, and to know
    # of one, each step of several processes begins with a broadcast.
    trainer._signal_connector.register_signal_handlers = _no
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _no
    # Not in the plugin that reads files: some strategies read their own.
    connector = trainer._checkpoint_connector
    connector.resume_start = partial(_load, trainer, connector.resume_start, adapt)
    # Lightning passes each loader through this, wherever it comes from.
    seam.trainer = trainer
    trainer.strategy.process_dataloader = partial(prepare, seam, trainer.strategy.process_dataloader)
    # Where training ends after max_steps, Lightning would train the last epoch of a finished one's checkpoint again.
    trainer.fit_loop._iteration_based_training = _no
    return trainer


def _count(trainer: Any) -> None:
    """What Lightning counts for all epochs alike: the steps of changing windows, the age of a monitored value."""
    from boltlab.training.fit_watch import measured_rarely

    if any(hasattr(callback, "get_accumulate_grad_batches") for callback in trainer.callbacks):
        from boltlab.training.accumulation import Counting

        trainer.__class__ = Counting
    if measured_rarely(trainer):
        from boltlab.training.monitored import Monitored

        trainer.callbacks.insert(1, Monitored(trainer))  # behind the one that knows the metrics of a resumed run


def _load(trainer: Any, load: Any, adapt: Any, *arguments: Any, **keywords: Any) -> None:
    """`load`, Lightning's own, and what is to be changed in the content of the checkpoint."""
    load(*arguments, **keywords)
    content = trainer._checkpoint_connector._loaded_checkpoint
    if content and trainer.state.fn != "fit":
        content["callbacks"] = {}  # they belong to the training
        # `state_dict` is what was validated. Lightning's WeightAveraging would put the training's weights over it.
        if "current_model_state" in content:
            content["current_model_state"] = content["state_dict"]
    elif content and adapt is not None:
        if "current_model_state" in content and "averaging_state" not in content:  # see fit_watch.keep_replaced
            content["state_dict"] = content.pop("current_model_state")
        adapt(content)


def _plugins(config: DictConfig) -> list[Any]:
    from boltlab.checkpoints.io import SafeCheckpointIO

    plugins = [SafeCheckpointIO(credentials.plain(config)), _environment(config)]
    if config.trainer.get("sync_batchnorm"):
        from boltlab.strategies.sync_batch_norm import SyncBatchNormPlugin

        plugins.append(SyncBatchNormPlugin())
    return plugins


def _environment(config: DictConfig) -> Any:
    """How a process finds the others: always from torch's own variables.

    Left to itself, Lightning takes whatever it finds (Slurm, LSF, MPI) for the one that started it: in a job script it
    waits for processes that nobody starts, and it queues the job again from a stale checkpoint.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    if "RANK" not in os.environ:
        return LightningEnvironment()
    if config.trainer.get("devices") == 1:  # a node of its own, also where several stand on one machine
        os.environ.update(LOCAL_RANK="0", GROUP_RANK=os.environ["RANK"])
    return TorchElasticEnvironment()


def _no() -> bool:
    return False
