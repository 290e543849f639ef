"""What Lightning's precision plugins (2.6.6) do to more than the net's arithmetic, undone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torchmetrics import Metric


def settle(trainer: Any) -> None:
    """Lets metrics and targets keep their dtype in `bf16-true` and `16-true`, and bf16-mixed clip gradients."""
    plugin = trainer.precision_plugin
    if plugin.precision in ("bf16-true", "16-true"):
        plugin.convert_module = partial(_convert_module, plugin.convert_module)
        plugin.convert_input = partial(_convert_input, trainer, plugin.convert_input)
    elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        # It refuses the fused optimizers, which undo a scaler's work by themselves: without a scaler there is none.
        plugin.clip_gradients = partial(Precision.clip_gradients, plugin)  # type: ignore[method-assign]


def _convert_module(convert: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
    """`convert`, past every torchmetrics object: what it has counted, its defaults and its buffers stay as they are.

    torchmetrics itself does so for `.half()` and not for `.to(dtype)`, which Lightning calls. Sums in 16 bits stand
    still at a few hundred samples.
    """
    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    for metric in metrics:
        vars(metric)["_apply"] = lambda fn, same=metric: same
    try:
        return convert(module)
    finally:
        for metric in metrics:
            del vars(metric)["_apply"]
            metric._apply(_widened)  # those that `configure_model` has made, where 16 bits are the default


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _convert_input(trainer: Any, convert: Callable[[Any], Any], batch: Any) -> Any:
    """`convert`, but for the targets of a module that computes loss and metrics in float32: `keeps_targets = True`."""
    if getattr(trainer.lightning_module, "keeps_targets", False) and isinstance(batch, (list, tuple)):
        return convert(batch[0]), *batch[1:]
    return convert(batch)
