"""TensorBoard: `tensorboard --logdir logs` shows all runs."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from boltlab.ground.errors import UserError
from boltlab.loggers.resumed import earlier, unknown


class TensorBoardLogger(LightningTensorBoardLogger):
    """Lightning's logger; the event files lie in ``<dir>/tensorboard``, complete after every call.

    Where a run was killed and resumes, TensorBoard is told to drop what is done again.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, dir: str | Path, log_graph: bool = False) -> None:
        try:
            super().__init__(save_dir=dir, name="", version="tensorboard", log_graph=log_graph, default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise UserError("logger=tensorboard needs TensorBoard: pip install 'boltlab[tensorboard]'") from error
        self._goes_on = any(Path(self.log_dir).glob("events.*"))
        self._known: set[tuple[str, int]] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is not None:
            metrics = unknown(metrics, step, self._known)
            if self._goes_on:
                self._goes_on = False
                self.experiment.close()
                self.experiment.purge_step = step  # of the next file, which is opened now
                before = earlier(Path(self.save_dir), step).get(step, {})
                metrics = {**before, **metrics}  # what was logged of this step, before the rest of it
                self._known = {(name, step) for name in before}
        super().log_metrics(metrics, step)
        self.experiment.flush()
