"""An optimizer with parameter groups for weight decay, and its schedule, as `configure_optimizers` returns them."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from boltlab.optim.schedulers import Schedule

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def decayed_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter and whether weight decay applies to it, for every parameter that is trained.

    Weights of two and more dimensions decay; biases, the parameters of norm layers and those that the net names in a
    method `no_weight_decay()` (timm's convention, for embeddings and tokens) do not.
    """
    excluded = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()  # type: ignore[operator]
    norms = {id(p) for module in net.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in norms
            yield name, parameter, decays and name not in excluded


def parameter_groups(net: nn.Module, decay_norms_and_biases: bool = False) -> list[dict[str, Any]]:
    """What an optimizer takes: the parameters that decay, and the others with `weight_decay` 0.

    The names travel along: Muon needs them, and they make the optimizer's state readable.
    """
    named = [(name, p, decays or decay_norms_and_biases) for name, p, decays in decayed_parameters(net)]
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p, decays in named if decays]},
        {"params": [(name, p) for name, p, decays in named if not decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    make: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], precision: str
) -> torch.optim.Optimizer:
    """`make` called with parameter groups: a torch optimizer whose `fused` is open takes the fused form where there is
    one for this device and dtype.

    precision: the Trainer's. Its 16-mixed refuses to clip gradients that a fused optimizer unscales; shards have other
        kernels, and the fused AdamW of 16-bit weights overflows where torch's other one does not.
    """
    arguments = getattr(make, "keywords", {})
    open_choice = "fused" in inspect.signature(make).parameters and arguments.get("fused") is None
    open_choice &= precision != "16-mixed" and not (arguments.get("foreach") or arguments.get("differentiable"))
    parameters = [p for group in groups for _, p in group["params"]]
    if open_choice and not any(
        hasattr(p, "to_local") or p.dtype == torch.float16 or not p.is_floating_point() for p in parameters
    ):
        with contextlib.suppress(RuntimeError):  # torch's word for a device or dtype without it
            return make([dict(group) for group in groups], fused=True)  # it writes into them
    return make(groups)


def configure(
    module: LightningModule,
    net: nn.Module,
    make: Callable[..., torch.optim.Optimizer],
    scheduler: Schedule | None = None,
    decay_norms_and_biases: bool = False,
) -> OptimizerLRScheduler:
    """For `configure_optimizers`: the optimizer of a net, and the schedule over the steps of the module's Trainer."""
    optimizer = make_optimizer(make, parameter_groups(net, decay_norms_and_biases), module.trainer.precision)
    if scheduler is None or not scheduler.changes:
        return optimizer
    trainer: Any = module.trainer
    total_steps = trainer.estimated_stepping_batches  # also makes the trainer count its batches
    if total_steps < 0:  # Lightning's word for a loader without a length
        total_steps = math.inf
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if math.isfinite(steps_per_epoch):
        steps_per_epoch = math.ceil(steps_per_epoch)
    if hasattr(trainer, "steps_of"):  # a GradientAccumulationScheduler: epochs of several lengths have none in common
        each = {trainer.steps_of(epoch) for epoch in range(max(trainer.max_epochs or 1, 1))}
        steps_per_epoch = each.pop() if len(each) == 1 else math.inf
    return [optimizer], scheduler.build(optimizer, total_steps, steps_per_epoch)  # type: ignore[return-value]
