"""Means over an epoch, exact whatever the sizes of the batches and on any number of processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean of the batches' losses, weighted by their samples.

    torchmetrics' MeanMetric looks for NaN at every step, which waits for the GPU; its nan_strategy="disable" drops the
    weights (1.9), which is wrong as soon as the last batch is smaller.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros((), dtype=_widest()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | int) -> None:
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        return (self.total / self.weight).float()


def _widest() -> torch.dtype:
    """For sums that do not depend on their order: MPS has no float64."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


class EpochMeans(Metric):
    """Means over a training epoch: of the loss, weighted as in `MeanLoss`, and of one more value of each sample.

    A step only keeps what it has computed, on its device; the sums are made of many steps together, for each operation
    costs as much as a hundredth of a small net's step. `add` goes past what torchmetrics does around each `update`;
    everything else (processes, state dict, precision) is torchmetrics'.
    """

    update_called = True  # known to nobody if `add` is not counted
    loss: Tensor
    weight: Tensor
    value: Tensor
    samples: Tensor

    def __init__(self, name: str, steps_together: int = 64) -> None:
        super().__init__(compute_with_cache=False)
        self.name = name
        self.steps_together = steps_together
        self._steps: list[tuple[Tensor, Tensor | int, Tensor]] = []
        for state in ("loss", "weight", "value", "samples"):
            self.add_state(state, torch.zeros((), dtype=_widest()), dist_reduce_fx="sum", persistent=True)

    def add(self, loss: Tensor, weight: Tensor | int, values: Tensor) -> None:
        """`loss`: the batch's mean, which stands for `weight`; `values` [B] of its samples."""
        self._steps.append((loss, weight, values))
        if len(self._steps) >= self.steps_together:
            self._sum_up()

    def _sum_up(self) -> None:
        steps, self._steps = self._steps, []
        # Batches of one size are summed as they are: a list of sizes would have to be brought to the device.
        by_size: dict[int, list[Tensor]] = {}
        for loss, weight, _ in steps:
            if isinstance(weight, Tensor):
                self.loss.add_(loss * weight)
                self.weight.add_(weight)
            else:
                by_size.setdefault(weight, []).append(loss)
        for size, losses in by_size.items():
            self.loss.add_(torch.stack(losses).sum(dtype=self.loss.dtype), alpha=size)
            self.weight.add_(size * len(losses))
        if steps:
            values = torch.cat([values for *_, values in steps])
            self.value.add_(values.sum(dtype=self.value.dtype))
            self.samples.add_(len(values))

    update = add

    def mark(self) -> tuple[list[Any], list[Tensor]]:
        """What was counted so far, for `back`: a step that is left out is not counted."""
        return list(self._steps), [getattr(self, name).clone() for name in self._defaults]

    def back(self, mark: tuple[list[Any], list[Tensor]]) -> None:
        self._steps = mark[0]
        for name, value in zip(self._defaults, mark[1], strict=True):
            getattr(self, name).copy_(value)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        self._sum_up()
        super().sync(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._sum_up()
        return super().state_dict(*args, **kwargs)

    def reset(self) -> None:
        self._steps = []
        super().reset()

    @property
    def names(self) -> tuple[str, str]:
        return "train_loss", f"train_{self.name}"

    def compute(self) -> dict[str, Tensor]:
        means = (self.loss / self.weight, self.value / self.samples)
        return {name: mean.float() for name, mean in zip(self.names, means, strict=True)}
