"""DeepSpeed's ZeRO: the optimizer's states, and the gradients, spread over the processes."""

from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy

from boltlab.ground.errors import UserError


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO stage 1 spreads the optimizer's states, stage 2 the gradients too; each process holds all weights.

    Checkpoints hold the weights, in files like any other's: `best` is tested, evaluated and loaded. DeepSpeed's own are
    folders of pickles, which are not replaced as a whole, so they are not written, and a run that was stopped begins
    again; with `trainer=fsdp` it resumes. Stage 3, where no process holds the weights, is `trainer=fsdp` as well.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, stage: Literal[1, 2] = 2, timeout: timedelta = timedelta(minutes=5)) -> None:
        for argument, message in self.check_arguments({"stage": stage}):
            raise UserError(f"{argument} {message}")
        # What it logs with a batch size is switched off; it would ask the loader for one.
        super().__init__(stage=stage, timeout=timeout, logging_batch_size_per_gpu=1)

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        if find_spec("deepspeed") is None:
            return [("stage", "needs the package deepspeed: pip install 'boltlab[deepspeed]'")]
        return []

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        kept = {k: v for k, v in checkpoint.items() if k != "optimizer_states"}  # a process knows a part of them
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(kept, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
