"""What can be read back from a database and from a real server, and that neither can hold a training up."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import binary
from waiting import HANG, until

from boltlab import runs
from boltlab.ground.errors import UserError

mlflow = pytest.importorskip("mlflow", reason="the extra boltlab[mlflow] is not installed")

from boltlab.loggers import mlflow as ours  # noqa: E402
from boltlab.loggers.mlflow import MLFlowLogger  # noqa: E402

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


@pytest.fixture(autouse=True)
def _no_server_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _time_to_finish(monkeypatch):
    """Where a test does not say it, MLflow and its server may take as long as they need."""
    monkeypatch.setattr(MLFlowLogger.__init__, "__defaults__", (*MLFlowLogger.__init__.__defaults__[:-2], HANG, HANG))


def warnings_of(caplog) -> list[str]:
    own = [record for record in caplog.records if record.name == "boltlab.loggers.mlflow"]
    return [record.getMessage() for record in own]


def only_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("boltlab").experiment_id])
    return run


@pytest.mark.slow
def test_a_run_can_be_read_back_from_the_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/logs/mlflow.db"
    picture = tmp_path / "matrix.png"
    picture.write_bytes(b"a picture")
    logger = MLFlowLogger(
        None, tmp_path, run_name="a run", artifact_dir=tmp_path / "mlflow", tags=["one"], database=uri
    )
    logger.log_hyperparams({"seed": 0, "optimizer": {"lr": 0.1}})
    logger.log_metrics({"val_acc": 0.5}, step=3)
    logger.log_metrics({"val_acc": 0.75}, step=7)
    logger.log_image("matrix", [str(picture)])
    logger.log_summary({"best/val_acc": 0.75})
    logger.finalize("success")

    client = mlflow.MlflowClient(tracking_uri=uri)
    run = only_run(client)
    assert client.get_experiment_by_name("boltlab").artifact_location == (tmp_path / "mlflow").as_uri()
    assert (run.info.run_name, run.info.run_id) == ("a run", logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "optimizer/lr": "0.1"}
    assert run.data.tags["one"] == "true"
    history = client.get_metric_history(run.info.run_id, "val_acc")
    assert [(point.step, point.value) for point in history] == [(3, 0.5), (7, 0.75)]
    assert run.data.metrics["best/val_acc"] == 0.75
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["matrix.png"]


def test_a_run_that_goes_on_is_the_same_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step, seed in ((3, 0), (7, 1)):
        logger = MLFlowLogger(uri, tmp_path, artifact_dir=tmp_path)
        logger.log_hyperparams({"seed": seed})  # MLflow refuses another value
        logger.log_metrics({"val_acc": 0.5}, step=step)
        logger.finalize("failed" if step == 3 else "success")
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = only_run(client)
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "0"})
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_acc")] == [3, 7]


@pytest.mark.slow
def test_a_run_whose_database_is_gone_begins_anew(tmp_path, caplog):
    for name in ("one", "two"):
        logger = MLFlowLogger(f"sqlite:///{tmp_path}/{name}.db", tmp_path / "run", artifact_dir=tmp_path)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finish()
    assert warnings_of(caplog) == []
    assert only_run(mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/two.db")).data.metrics == {"loss": 1.0}


def test_a_run_of_a_sweep_says_so(tmp_path):
    logger = MLFlowLogger(None, tmp_path / "logs" / "train" / "sweep" / "3")
    assert (logger._run_name, logger._tags) == ("sweep/3", {"sweep": "sweep", "job_type": "trial"})


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'boltlab\[mlflow\]'"):
        MLFlowLogger(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_server_that_is_not_there_is_one_warning_and_the_database_has_the_run(
    tmp_path, caplog, free_port, monkeypatch
):
    uri, logged, ask = f"sqlite:///{tmp_path}/mlflow.db", threading.Event(), ours.no_answer

    def held_up(*arguments):
        assert logged.wait(HANG)
        return ask(*arguments)

    monkeypatch.setattr(ours, "no_answer", held_up)
    logger = MLFlowLogger(f"http://me:hunter22@127.0.0.1:{free_port}", tmp_path / "run", database=uri)
    logger.log_hyperparams({"seed": 0})
    logger.log_metrics({"loss": 1.0}, 0)
    logged.set()  # nothing has waited
    logger.finish()
    (warning,) = warnings_of(caplog)
    expected = (
        f"The MLflow server http://me:***@127.0.0.1:{free_port} cannot be used (cannot be reached: ConnectionError)"
    )
    assert warning == f"{expected}: this run goes into {uri}"
    assert only_run(mlflow.MlflowClient(tracking_uri=uri)).data.metrics == {"loss": 1.0}


def test_without_a_database_training_goes_on_without_mlflow(tmp_path, caplog, free_port):
    logger = MLFlowLogger(f"http://127.0.0.1:{free_port}", tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finish()
    assert logger.run_id is None
    (warning,) = warnings_of(caplog)
    assert warning.startswith("MLflow does not get the rest of this run (ConnectionError: http://127.0.0.1:")


def test_the_end_waits_for_the_warning(tmp_path, caplog, free_port, monkeypatch):
    warn = ours.log.warning
    monkeypatch.setattr(ours.log, "warning", lambda *arguments: (time.sleep(0.5), warn(*arguments)))
    logger = MLFlowLogger(f"http://127.0.0.1:{free_port}", tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    until(lambda: logger._given_up)
    logger.finish()
    assert len(warnings_of(caplog)) == 1


def test_a_server_that_never_answers_is_waited_for_no_longer_than_asked(tmp_path, caplog):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        logger = MLFlowLogger(uri, tmp_path, timeout_seconds=60.0, finish_timeout_seconds=0.5)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finish()
    assert warnings_of(caplog) == ["MLflow does not get the rest of this run (does not take it within 0.5 s)"]


def test_a_server_that_fails_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        logger = MLFlowLogger(f"http://127.0.0.1:{server.server_port}", tmp_path, database=uri)
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
        logger.finish()
    finally:
        server.shutdown()
        server.server_close()
    (warning,) = warnings_of(caplog)
    assert "cannot be used" in warning
    assert only_run(mlflow.MlflowClient(tracking_uri=uri)).data.metrics == {"loss": 1.0}


@pytest.fixture
def tracking_server(tmp_path, free_port):
    """`make tracking-server` as it stands in the Makefile, in a folder of its own: its address."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    listed = subprocess.run(
        ["make", "-n", "-f", MAKEFILE, "-o", ".venv/.dev", "tracking-server", f"PORT={free_port}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert f"--host 127.0.0.1 --port {free_port}" in listed and "MLFLOW_DISABLE_TELEMETRY=true" in listed
    command = re.sub(r"(?<!\S)\.venv/bin/python(?!\S)", sys.executable, listed)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["sh", "-c", command], cwd=tmp_path, stdout=said, stderr=said, start_new_session=True
        )
        try:
            end = time.monotonic() + HANG
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/health", timeout=60) as answer:
                        assert answer.read() == b"OK"
                        break
                except OSError:
                    said.seek(0)
                    assert process.poll() is None and time.monotonic() < end, said.read()
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{free_port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(HANG)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="ends a whole group of processes at once")
@pytest.mark.services
def test_a_training_on_the_team_server(boltlab, tmp_path, tracking_server, caplog):
    more = ["model=linear", "trainer.max_epochs=2", "trainer.accelerator=cpu", "name=seen-by-the-team", "tags=[trial]"]
    more += ["logger=[csv,mlflow]", f"logger.mlflow.tracking_uri={tracking_server}", "logger.mlflow.log_model=best"]
    code, _, err = boltlab("train", *more)
    assert code == 0, err
    assert warnings_of(caplog) == []

    client = mlflow.MlflowClient(tracking_uri=tracking_server)
    experiment = client.get_experiment_by_name("boltlab")
    (folder,) = runs.folders("logs")
    summary = runs.read_summary(folder)

    def search(filter_string):
        return client.search_runs([experiment.experiment_id], filter_string)

    (run,) = search("params.`optimizer/lr` = '0.003' and metrics.`best/val_acc` > 0.1 and tags.trial = 'true'")
    assert search("params.`optimizer/lr` = '0.5'") == search("metrics.`best/val_acc` > 1") == []
    assert (run.info.run_name, run.info.status) == ("seen-by-the-team", "FINISHED")
    assert run.data.metrics["best/val_acc"] == pytest.approx(summary["best"]["val_acc"])
    assert run.data.metrics["test/acc"] == pytest.approx(summary["test"]["test_acc"])
    assert len(client.get_metric_history(run.info.run_id, "val_acc")) == 2

    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.json", "confusion_matrix.png", "checkpoints"} <= names
    read = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
    assert read.read_bytes() == (folder / "config.yaml").read_bytes()
    kept = Path(client.download_artifacts(run.info.run_id, "checkpoints/best.ckpt", str(tmp_path)))
    assert kept.read_bytes() == (folder / "checkpoints" / "best.ckpt").read_bytes()

    page = f"{tracking_server}/#/experiments/{experiment.experiment_id}/runs"
    assert "seen-by-the-team" in rendered(page, tmp_path)
    shown = rendered(f"{tracking_server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}", tmp_path)
    assert "seen-by-the-team" in shown and "best/val_acc" in shown


def rendered(address: str, tmp_path: Path) -> str:
    """The page as a browser has built it."""
    if (browser := binary()) is None:
        pytest.skip("no Chromium is installed: all but the page was tested")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'chromium'}"]
    command = [browser, *flags, "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True).stdout
