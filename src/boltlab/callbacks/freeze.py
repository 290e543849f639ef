"""Trains a part of the net at first: the head of a pretrained net alone, then more of it, group by group."""

import difflib
import itertools
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from boltlab.ground.errors import UserError

LAST = "last_layer"


class Freeze(Callback):
    """Freezes the net's parameters but those that `train_from` names.

    `train_from`: pairs of an epoch and what is trained from it on, for example [[0, fc], [3, layer4], [5, "*"]].
    A pattern (with * and ?) matches the name of a parameter or of a module that holds it, as `model.net` names them;
    "last_layer" stands for the module with parameters that comes last. `norms_in_eval`: a batch norm that is frozen
    keeps its statistics, too, and normalizes with them.

    What is frozen follows from the epoch alone, so a resumed run has the same. A frozen parameter stays in the
    optimizer, whose groups, schedule and checkpoints are those of any other run, but it has no gradient and every
    optimizer passes over it: no weight decay, no momentum, and its moments begin when it is trained. (Lightning's
    BaseFinetuning adds parameter groups instead, which a schedule made before does not know.)

    Raises:
        UserError: a pattern matches nothing, or the strategy spreads the weights over devices.
    """

    def __init__(self, train_from: list[tuple[int, str]], norms_in_eval: bool = True) -> None:
        for argument, message in self.check_arguments({"train_from": train_from}):
            raise ValueError(f"{argument} {message}")
        self.train_from, self.norms_in_eval = train_from, norms_in_eval

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """Nothing is trained in the first epoch."""
        message = f"begins with epoch 0 and what is trained then, for example [[0, {LAST}], [3, '*']]"
        begins = min((epoch for epoch, _ in arguments["train_from"]), default=-1) == 0
        return [] if begins else [("train_from", message)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("callbacks.freeze: weights that are spread over devices cannot be frozen: trainer=ddp")
        if isinstance(trainer.strategy, DDPStrategy):
            # DDP waits for the gradient of each parameter that it saw when it was made, unless it looks for them at
            # each step.
            trainer.strategy._ddp_kwargs.update(find_unused_parameters=True, static_graph=False)
        net = _net(pl_module)
        names = {name: None for full, _ in net.named_parameters() for name in _names(full)}
        for _, pattern in self.train_from:
            if pattern != LAST and not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.5) or list(net._modules)
                message = f"{pattern!r} matches no parameter or module of the net; there are: {', '.join(near)}"
                raise UserError(f"callbacks.freeze.train_from: {message}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: the optimizer is made of what is trained. And the next hook is left out where a run resumes in
        # the middle of an epoch.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(_net(pl_module), trainer.current_epoch)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("fused") and group.get("momentum"):
                    _complete_momenta(group["params"], optimizer.state)

    def _apply(self, net: nn.Module, epoch: int) -> None:
        patterns = [pattern for start, pattern in self.train_from if start <= epoch]
        if LAST in patterns:
            patterns.append([name for name, module in net.named_modules() if module._parameters][-1])
        for module_name, module in net.named_modules():
            for name, parameter in module.named_parameters(module_name, recurse=False):
                parameter.requires_grad_(_matches(name, patterns))
            if self.norms_in_eval and isinstance(module, nn.modules.batchnorm._NormBase):
                module.train(_matches(module_name, patterns))


def _net(pl_module: LightningModule) -> nn.Module:
    net = getattr(pl_module, "net", pl_module)
    assert isinstance(net, nn.Module)
    return net


def _complete_momenta(parameters: list[nn.Parameter], state: Any) -> None:
    """torch's fused SGD fails where some parameters of a group have a momentum and others, trained from now on, do not;
    its step with a momentum of zero is a first step."""
    if any(state[p].get("momentum_buffer") is not None for p in parameters if p in state):
        for p in parameters:
            if p.requires_grad and state[p].get("momentum_buffer") is None:
                state[p]["momentum_buffer"] = torch.zeros_like(p)


def _names(name: str) -> list[str]:
    """The name and those of all modules around it: a.b.c → a, a.b, a.b.c."""
    return [*itertools.accumulate(name.split("."), "{}.{}".format)]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(outer, pattern) for outer in _names(name) for pattern in patterns)
