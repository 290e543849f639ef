"""DDP that sends its gradients in 16 bits: half the bytes between the devices at each step."""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


class CompressedDDP(DDPStrategy):
    """Gradients are rounded to `gradient_dtype`, summed in it over the processes, and widened again.

    bf16 has the range of float32 and 8 bits of precision; fp16 has 11, and overflows above 65504. Weights, optimizer
    and the gradients within a process stay as the precision says. The rounding is part of the run: another number of
    processes rounds other sums.

    Lightning's DDPStrategy takes such a hook too, but on a CPU it leaves it out without a word (2.6.6), so that what
    runs in a test is not what runs on a GPU.

    `kwargs`: of Lightning's DDPStrategy and of DistributedDataParallel.
    """

    def __init__(self, gradient_dtype: Literal["bf16", "fp16"] = "bf16", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gradient_dtype = gradient_dtype

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(torch.distributed.group.WORLD, HOOKS[self.gradient_dtype])
