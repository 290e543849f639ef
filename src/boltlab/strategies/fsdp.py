"""FSDP2: weights, gradients and optimizer states spread over the processes; and tensor parallelism within that."""

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from boltlab.checkpoints.file import CheckpointError, verify
from boltlab.ground.errors import UserError
from boltlab.strategies.sync_batch_norm import synchronized


class FSDP(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, with the net cut into units and with whole checkpoints only.

    A unit's weights are gathered right before they are used and dropped right after, forward and backward, so a process
    holds its share of all weights and the whole of about two units (the next one is fetched meanwhile). Units are the
    blocks of a net, as `units` finds them, from `min_num_params` parameters on; what is in none (stem, head, small
    blocks) is one unit more, which stays gathered from its forward pass to its backward pass.

    A checkpoint is gathered tensor by tensor into the CPU's memory of rank 0 and written as any other: one file,
    hashed, synced and renamed, which `eval`, `boltlab.load` and a run with any number of processes read. Lightning's
    folders of shards would be read with pickle, and their files are not replaced together.

    `tensor_parallel_size`: processes that share each batch and divide the layers that the net's `tensor_parallel_plan`
    names.
    """

    def __init__(
        self,
        min_num_params: Annotated[int, Ge(0)] = 1_000_000,
        tensor_parallel_size: Annotated[int, Ge(1)] = 1,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint=False, timeout=timeout)
        self.min_num_params = min_num_params
        self.tensor_parallel_size = tensor_parallel_size
        self._is_spread = False

    def spread(self, module: LightningModule, nets: list[nn.Module]) -> None:
        """Divides the nets' dense layers within each tensor-parallel group, then shards their units over the groups.

        For a module that does nothing of that itself in `configure_model`, which Lightning may call more than once.
        """
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import parallelize_module
        from torchmetrics import Metric

        if self._is_spread or self.device_mesh is None:
            return
        self._is_spread, mesh = True, self.device_mesh
        if self._layer_sync is not None:  # which Lightning heeds under DDP only
            synchronized(module, mesh.device_type)
        self._refuse(module, nets)
        for net in nets:
            if self.tensor_parallel_size > 1:
                plan: Any = net.tensor_parallel_plan
                parallelize_module(net, mesh["tensor_parallel"], plan())
            for _, unit in list(units(net, self.min_num_params)):
                fully_shard(unit, mesh=mesh["data_parallel"])
            fully_shard(net, mesh=mesh["data_parallel"])
        if self.tensor_parallel_size > 1:
            for metric in module.modules():  # the processes of a group count the same samples
                if isinstance(metric, Metric):
                    metric.process_group = mesh["data_parallel"].get_group()

    def _refuse(self, module: Any, nets: list[nn.Module]) -> None:
        """
        Raises:
            UserError: the nets hold not all parameters, or do not say how they are divided.
        """
        if own := [name for name, _ in module.named_parameters(recurse=False)]:  # of which no gradient would be shared
            raise UserError(
                f"trainer=fsdp spreads the nets of a module, and {type(module).__name__} has {', '.join(own)} beside"
                " them: put such parameters into a net, or spread them in `configure_model`"
            )
        without = [type(net).__name__ for net in nets if not hasattr(net, "tensor_parallel_plan")]
        if self.tensor_parallel_size > 1 and without:
            raise UserError(f"trainer.strategy.tensor_parallel_size: {without[0]} has no method tensor_parallel_plan")

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel_size
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self.tensor_parallel_size > 1:
            self.precision_plugin.clip_grad_by_norm = _clip_by_norm  # type: ignore[method-assign]
            # It warns of how a tensor that is divided twice is gathered for a checkpoint.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    # Lightning (2.6.6) numbers the optimizer's parameters as they stand in the net. Everywhere else the numbers follow
    # the optimizer's groups, and one parameter would be given the state of another.

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer), options=options)
        names = [name for group in state.get("param_groups", []) for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if problem := verify(path):
            raise CheckpointError(f"the checkpoint {path} {problem}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert self.model is not None and self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        _load_raw_module_state(content.pop("state_dict"), self.model, strict=strict)
        known = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.get("optimizer_states", []), strict=False):
            if not state["state"]:  # of SGD without momentum; torch finds no device in it
                optimizer.load_state_dict(state)
                continue
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
            named = _renamed(state, dict(zip(numbers, own, strict=True)))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return content


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names, or numbers, of its parameters; empty where it is (on other ranks)."""
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in state.get("param_groups", [])]
    return {"state": {names[p]: s for p, s in state["state"].items()}, "param_groups": groups} if groups else state


def _clip_by_norm(optimizer: Any, clip_val: float) -> None:
    """torch joins no norms of tensors that lie on different meshes, as divided and undivided layers do."""
    meshes: dict[Any, list[Any]] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        meshes.setdefault(parameter.grad.device_mesh, []).append(parameter)
    norms: list[Any] = [nn.utils.get_total_norm([p.grad for p in part]) for part in meshes.values()]
    total = torch.linalg.vector_norm(torch.stack([norm.full_tensor() for norm in norms]))
    for part in meshes.values():
        nn.utils.clip_grads_with_norm_(part, clip_val, total)


def units(module: nn.Module, min_num_params: int, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what is gathered at once: the members of a net's sequences and lists.

    Sequences of sequences are opened, so that a stage of blocks becomes its blocks. A class that inherits from
    nn.Sequential is a block of its own.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    for child_name, child in module.named_children():
        inner = f"{name}.{child_name}" if name else child_name
        if type(child) in containers or type(module) not in containers:
            yield from units(child, min_num_params, inner)
        elif sum(p.numel() for p in child.parameters()) >= min_num_params:
            yield inner, child
