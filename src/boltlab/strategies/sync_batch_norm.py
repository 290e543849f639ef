"""Batch normalization over the samples of all processes (`trainer.sync_batchnorm=true`), also on CPUs.

torch.nn.SyncBatchNorm has kernels for accelerators alone and refuses a CPU; there the statistics are summed here.
"""

from typing import Any

import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    backward = forward


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of [B, C, …]; B may differ between the processes, and be 0 on some."""

    of_all_processes = True

    def _check_input_dim(self, input: Tensor) -> None:
        """Of any number of dimensions, as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        if not self.training or alone:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        sums = SumOverProcesses.apply(torch.cat([wide.sum(dims), wide.new_tensor([wide.numel() / wide.shape[1]])]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centered = wide - mean.view(shape)
        variance = SumOverProcesses.apply(centered.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
        y = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronized(model: nn.Module, device_type: str) -> nn.Module:
    """The model with synchronized batch norms in the place of the others, for training on such a device."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm and device_type == "cpu":
            module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
    return model


class SyncBatchNormPlugin(TorchSyncBatchNorm):
    """How Lightning's DDP strategy asks for it."""

    def apply(self, model: nn.Module) -> nn.Module:
        return synchronized(model, next(model.parameters()).device.type)
