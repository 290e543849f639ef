"""TensorBoard: `tensorboard --logdir logs` shows all runs."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger

from boltlab.ground.errors import UserError


class TensorBoardLogger(LightningTensorBoardLogger):
    """Lightning's logger; the event file lies in ``<dir>/tensorboard``.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, dir: str | Path, log_graph: bool = False) -> None:
        try:
            super().__init__(save_dir=dir, name="", version="tensorboard", log_graph=log_graph, default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise UserError("logger=tensorboard needs TensorBoard: pip install 'boltlab[tensorboard]'") from error
