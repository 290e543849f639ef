"""The Trainer that a config describes."""

import logging
import warnings
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab.config import build


def make_trainer(config: DictConfig, **arguments: Any) -> Any:
    """The Trainer that a config describes, with its callbacks, its loggers and our checkpoint files."""
    import torch

    from boltlab.checkpoint import SafeCheckpointIO

    torch.set_float32_matmul_precision(config.get("float32_matmul_precision", "highest"))
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch 2.15 in a way that torch warns of at every run; nothing here can change it.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
    # Epoch values are logged whatever the interval is.
    warnings.filterwarnings("ignore", ".*smaller than the logging interval", UserWarning)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return build(
        config,
        "trainer",
        callbacks=[build(config, f"callbacks.{name}") for name in config.get("callbacks") or {}],
        logger=[build(config, f"logger.{name}") for name in config.get("logger") or {}],
        plugins=[SafeCheckpointIO(plain)],
        **arguments,
    )


def several_steps(config: DictConfig, data: Any, model: Any) -> dict[str, Any]:
    """Prepares data and model for `steps_per_execution`; returns what the Trainer is to be given instead of its own."""
    if config.steps_per_execution == 1:
        return {}
    model.steps_per_execution = config.steps_per_execution
    model.accumulated_batches = config.trainer.accumulate_grad_batches
    model.batch_size = config.data.batch_size
    data.batches_per_fetch = model.steps_per_execution * model.accumulated_batches
    return {"accumulate_grad_batches": 1}
