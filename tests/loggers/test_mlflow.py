import sys

import pytest

from boltlab.errors import UserError

mlflow = pytest.importorskip("mlflow", reason="the extra boltlab[mlflow] is not installed")

from boltlab.loggers.mlflow import MLFlowLogger  # noqa: E402


def test_a_run_can_be_read_back_from_the_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/logs/mlflow.db"
    logger = MLFlowLogger(uri, tmp_path, run_name="a run", artifact_dir=tmp_path / "logs" / "mlflow", tags=["one"])
    logger.log_hyperparams({"seed": 0, "optimizer": {"lr": 0.1}})
    logger.log_metrics({"val_acc": 0.5}, step=3)
    logger.log_metrics({"val_acc": 0.75}, step=7)
    logger.finalize("success")

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("boltlab")
    (run,) = client.search_runs([experiment.experiment_id])
    assert experiment.artifact_location == (tmp_path / "logs" / "mlflow").as_uri()
    assert run.info.run_name == "a run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "optimizer/lr": "0.1"}
    assert run.data.tags["one"] == "true"
    history = client.get_metric_history(run.info.run_id, "val_acc")
    assert [(point.step, point.value) for point in history] == [(3, 0.5), (7, 0.75)]


def test_a_run_that_goes_on_is_the_same_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step, seed in ((3, 0), (7, 1)):
        logger = MLFlowLogger(uri, tmp_path, artifact_dir=tmp_path)
        logger.log_hyperparams({"seed": seed})  # MLflow refuses another value
        logger.log_metrics({"val_acc": 0.5}, step=step)
        logger.finalize("failed" if step == 3 else "success")
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("boltlab").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_acc")] == [3, 7]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import mlflow as lightnings

    monkeypatch.setattr(lightnings, "_MLFLOW_AVAILABLE", False)
    monkeypatch.setattr(lightnings, "_MLFLOW_SKINNY_AVAILABLE", False, raising=False)
    with pytest.raises(UserError, match=r"pip install 'boltlab\[mlflow\]'"):
        MLFlowLogger(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    assert "mlflow" in sys.modules
