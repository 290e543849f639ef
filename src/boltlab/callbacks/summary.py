"""A table of the model's layers before training: parameters, output shapes, FLOPs."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Layer:
    """One row; ``shape`` is that of the output of one sample, ``flops`` those of its forward pass."""

    name: str
    kind: str
    parameters: int
    shape: tuple[int, ...] | None = None
    flops: int | None = None


class ModelSummary(Callback):
    """Prints the layers of ``model.net`` (of the whole module where that is not all of it) down to ``max_depth``.

    FLOPs are those of the forward pass of one sample of ``trainer.datamodule.input_shape``; a multiply-add counts as
    two. They are counted on a copy without storage (device "meta"), so nothing is computed and neither weights, random
    state nor batch statistics of the model are touched. Where a net cannot run like that, the column stays empty.
    ``parameters``, ``trainable_parameters`` and ``flops_per_sample`` (None if unknown) can be read afterwards.
    """

    def __init__(self, max_depth: int = 2, max_rows: int = 40) -> None:
        self.max_depth = max_depth
        self.max_rows = max_rows
        self.parameters = 0
        self.trainable_parameters = 0
        self.flops_per_sample: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The net is whole here: no strategy has sharded it yet, nothing is compiled.
        if stage != "fit" or not trainer.is_global_zero:
            return
        net = getattr(pl_module, "net", None)
        if not isinstance(net, nn.Module) or _count(net) != _count(pl_module):
            net = pl_module
        input_shape = getattr(getattr(trainer, "datamodule", None), "input_shape", None)
        layers = summarize(net, tuple(input_shape) if input_shape else None)
        total = layers[0]
        self.parameters, self.flops_per_sample = total.parameters, total.flops
        self.trainable_parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        get_console().print(self._table(layers))

    def _table(self, layers: list[Layer]) -> Table:
        total, inner = layers[0], [layer for layer in layers[1:] if layer.parameters or layer.flops]
        for depth in range(self.max_depth, -1, -1):
            shown = [layer for layer in inner if layer.name.count(".") < depth]
            if len(shown) <= self.max_rows:
                break
        right = [Column(name, justify="right") for name in ("output", "parameters", "FLOPs/sample")]
        table = Table(Column("layer", overflow="fold"), "type", *right, box=None, pad_edge=False, header_style="bold")
        for layer in shown:
            indent, shape = "  " * layer.name.count("."), "x".join(map(str, layer.shape or ()))
            flops = "" if layer.flops is None else human(layer.flops)
            table.add_row(indent + layer.name, layer.kind, shape, f"{layer.parameters:,}", flops)
        frozen = total.parameters - self.trainable_parameters
        note = f" ({frozen:,} frozen)" if frozen else ""
        flops = "?" if total.flops is None else human(total.flops)
        table.add_row("total", total.kind + note, "", f"{total.parameters:,}", flops, style="bold")
        return table


def summarize(net: nn.Module, input_shape: tuple[int, ...] | None) -> list[Layer]:
    """The net itself, named "", and all modules in it, in order. ``input_shape`` is that of one sample."""
    layers = {name: Layer(name, type(module).__name__, _count(module)) for name, module in net.named_modules()}
    if input_shape is None:
        return list(layers.values())
    try:
        twin = _without_storage(net).eval()
        names = {id(module): name for name, module in twin.named_modules()}

        def note_shape(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                layers[names[id(module)]].shape = tuple(output.shape[1:])

        for module in twin.modules():
            module.register_forward_hook(note_shape)
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        example = torch.zeros(1, *input_shape, device="meta", dtype=dtype)
        # A compiled net is counted as it is written: compiling it for this would take longer than all else.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            twin(example)
        counts = counter.get_flop_counts()
        root = type(twin).__name__
        for name, layer in layers.items():
            layer.flops = sum(counts.get(f"{root}.{name}" if name else "Global", {}).values())
    except Exception:  # whatever a net does in its forward pass, a table must not stop a training
        for layer in layers.values():
            layer.shape = layer.flops = None
    return list(layers.values())


def _without_storage(net: nn.Module) -> nn.Module:
    """A deep copy with all weights and buffers on the meta device; the copy never holds their values."""
    copies: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in (*net.parameters(), *net.buffers())}
    copies |= {id(p): nn.Parameter(copies[id(p)], requires_grad=False) for p in net.parameters()}
    return copy.deepcopy(net, copies)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def human(number: float) -> str:
    """1234567 → "1.23 M"."""
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"
