"""MLflow, by default on an SQLite file: a team's server without an account, or just `mlflow ui`."""

from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger as LightningMLFlowLogger

from boltlab.errors import UserError


class MLFlowLogger(LightningMLFlowLogger):
    """Lightning's logger with our argument names.

    Args:
        tracking_uri: ``sqlite:///path``, or the address of a server.
        artifact_dir: where files go; a server has its own place.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str = "boltlab",
        run_name: str | None = None,
        artifact_dir: str | Path | None = None,
        tags: list[str] | None = None,
    ) -> None:
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
            )
        except ModuleNotFoundError as error:
            raise UserError("logger=mlflow needs MLflow: pip install 'boltlab[mlflow]'") from error
