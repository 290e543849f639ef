"""MLflow, by default on an SQLite file: a team's server without an account, or just `mlflow ui`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger as LightningMLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from boltlab.errors import UserError

RUN_ID = ".mlflow-id"  # of the run folder


class MLFlowLogger(LightningMLFlowLogger):
    """Lightning's logger with our argument names.

    Args:
        dir: the run folder; a run that goes on in it is the same MLflow run.
        tracking_uri: ``sqlite:///path``, or the address of a server.
        artifact_dir: where files go; a server has its own place.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str,
        dir: str | Path,
        experiment_name: str = "boltlab",
        run_name: str | None = None,
        artifact_dir: str | Path | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self._kept = Path(dir) / RUN_ID
        place = None
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            place = Path(artifact_dir).resolve().as_uri() if artifact_dir else None
        try:
            super().__init__(
                experiment_name=experiment_name,
                run_name=run_name,
                tracking_uri=tracking_uri,
                tags=dict.fromkeys(tags or [], "true"),
                artifact_location=place,
                run_id=self._kept.read_text(encoding="utf-8").strip() if self._kept.is_file() else None,
            )
        except ModuleNotFoundError as error:
            raise UserError("logger=mlflow needs MLflow: pip install 'boltlab[mlflow]'") from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """MLflow keeps a run's parameters as they were first logged: one that goes on logs none again."""
        if self._kept.is_file():
            self.experiment.update_run(self.run_id, status="RUNNING")
            return
        super().log_hyperparams(params)
        self._kept.write_text(str(self.run_id), encoding="utf-8")
