"""What reaches the file of an offline run, and that no server can hold a training up."""

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import wandb
from waiting import HANG, until

from boltlab.loggers.wandb import WandbLogger

KEY = "a" * 40


@pytest.fixture(autouse=True)
def _clean_wandb(monkeypatch, tmp_path):
    """No key, no settings, no session of another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setattr("boltlab.loggers.wandb._newest", None)
    monkeypatch.setattr("boltlab.loggers.wandb._staged", None)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server():
    """A loopback server; ``server(handle)`` answers each POST with the HTTP status that ``handle(body)`` returns."""
    servers = []

    def serve(handle):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                status = handle(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *arguments):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for each in servers:
        each.shutdown()
        each.server_close()


def offline_folder(run_dir: Path) -> Path:
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    return folder


def records(folder: Path) -> list[dict]:
    """What `wandb sync` would upload."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def history(file: Path) -> list[dict]:
    return [record["history"]["item"] for record in records(file.parent) if record["type"] == "history"]


def warnings_of(caplog) -> list[str]:
    """What a user sees: wandb's own loggers have no handler."""
    shown = [record for record in caplog.records if not record.name.startswith("wandb")]
    return [record.getMessage() for record in shown if record.levelno >= logging.WARNING]


def test_an_offline_run_holds_what_was_logged(tmp_path, caplog, capfd):
    run_dir = tmp_path / "run folder"
    run_dir.mkdir()
    (run_dir / "environment.json").write_text('{"git_commit": "0123456789abcdef"}')
    (run_dir / "git.patch").write_text("+a line")
    config = {"seed": 0, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "name": None, "augment": {}}
    logged = [({"train_loss": 1.5, "epoch": 0}, 9), ({"val_acc": 0.25, "epoch": 0}, 9), ({"train_loss": 0.5}, 19)]

    logger = WandbLogger(run_dir, project="a project", tags=["one", "two"], group="a group")
    logger.log_hyperparams(config)
    for metrics, step in logged:
        logger.log_metrics(metrics, step)
    logger.finish()

    folder = offline_folder(run_dir)
    found = records(folder)
    history = [record["history"]["item"] for record in found if record["type"] == "history"]
    values = [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]
    assert values == [{**metrics, "trainer/global_step": step} for metrics, step in logged]
    saved = {}
    for record in found:
        saved |= record.get("config", {}).get("update", {})
    assert saved == config
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    assert (run["display_name"], run["project"], run["run_group"]) == ("run folder", "a project", "a group")
    assert run["tags"] == ["one", "two"]
    assert run["run_id"] == logger.version
    assert "0123456789abcdef" in json.dumps(found)
    files = {entry["path"] for record in found if record["type"] == "files" for entry in record["files"]["files"]}
    assert {"environment.json", "git.patch"} <= files
    assert (folder / "files" / "git.patch").read_text() == "+a line"
    assert found[-1]["exit"]["exit_code"] == 0

    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        "W&B is offline (no API key; `wandb login` saves one). To upload this run: boltlab sync '"
    )
    assert Path(warning.split("'")[1]).resolve() == folder.resolve().parent.parent
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize(
    ("folder", "name", "group", "kind"),
    [
        ("train/a", "a", None, "train"),
        ("train/sweep/1-2", "sweep/1-2", "sweep", "trial"),
        ("eval/a", "a", None, "eval"),
        ("elsewhere", "elsewhere", None, None),
    ],
)
def test_group_and_job_type_come_from_where_the_run_stands(tmp_path, folder, name, group, kind):
    found = WandbLogger(tmp_path / "logs" / folder)._wandb_init
    assert (found["name"], found["group"], found["job_type"]) == (name, group, kind)
    asked = WandbLogger(tmp_path / "logs" / folder, group="mine", job_type="debug", name="b")._wandb_init
    assert (asked["name"], asked["group"], asked["job_type"]) == ("b", "mine", "debug")


def last_summary(found: list[dict]) -> dict:
    summary = {}
    for record in found:
        summary |= record.get("summary", {}).get("update", {})
    return summary


@pytest.mark.parametrize(("mode", "best"), [("max", 0.9), ("min", 0.1)])
def test_the_summary_has_the_last_and_the_best_value_and_what_the_run_comes_to(tmp_path, mode, best):
    logger = WandbLogger(tmp_path, monitor="val_score", monitor_mode=mode)
    for step, value in enumerate([0.1, 0.9, 0.3]):
        logger.log_metrics({"val_score": value, "loss": 1.0 - value}, step)
    logger.log_summary({"best/val_score": best, "test/acc": 0.5})
    logger.finish()
    summary = last_summary(records(offline_folder(tmp_path)))
    assert summary["val_score"] == {"last": 0.3, mode: best}
    assert (summary["loss"], summary["best/val_score"], summary["test/acc"]) == (0.7, best, 0.5)


def test_a_table_with_pictures_and_the_plot_of_a_confusion_matrix(tmp_path):
    import torch
    from PIL import Image

    run_dir = tmp_path / "run"
    (run_dir / "mistakes").mkdir(parents=True)
    picture = run_dir / "mistakes" / "01.png"
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(picture)
    logger = WandbLogger(run_dir)
    logger.log_table("worst", ["picture", "true", "loss"], [[picture, "cat", 2.5]])
    logger.log_confusion_matrix("matrix", torch.tensor([[3, 1], [0, 2]]), ["cat", "dog"])
    logger.log_confusion_matrix("too many", torch.zeros(101, 101), ["a"] * 101)
    logger.finish()

    found = records(offline_folder(run_dir))
    files = {e["path"]: Path(e["local_path"]) for r in found if "artifact" in r for e in contents(r["artifact"])}
    assert len(files) == 3 and all(path.is_relative_to(run_dir.resolve()) for path in files.values())
    worst, matrix = (json.loads(files[f"{name}.table.json"].read_text()) for name in ("worst", "matrix_table"))
    ((image, true, loss),) = worst["data"]
    assert (image["_type"], image["width"], true, loss) == ("image-file", 4, "cat", 2.5)
    assert np.array_equal(np.asarray(Image.open(files[image["path"]])), np.asarray(Image.open(picture)))
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert matrix["data"] == [["cat", "cat", 3], ["cat", "dog", 1], ["dog", "cat", 0], ["dog", "dog", 2]]
    assert "wandb/confusion_matrix/v1" in json.dumps([record.get("config") for record in found])
    assert "too many" not in json.dumps(found)


def contents(artifact: dict) -> list[dict]:
    return artifact["manifest"]["contents"]


def test_what_a_run_of_a_sweep_leaves(boltlab, tmp_path, monkeypatch):
    from boltlab import runs

    monkeypatch.setenv("WANDB_MODE", "offline")
    code, _, err = boltlab("train", "-m", "seed=5", "model=linear", "trainer.max_epochs=1", "trainer.accelerator=cpu")
    assert code == 0, err
    (run_dir,) = runs.folders("logs")
    folder = offline_folder(run_dir)
    found = records(folder)
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    sweep = run_dir.parent.name
    assert (run["run_group"], run["job_type"], run["display_name"]) == (sweep, "trial", f"{sweep}/0")
    config = {}
    for record in found:
        config |= record.get("config", {}).get("update", {})
    assert config["optimizer"]["lr"] == 0.003 and config["data"]["class_names"][3] == "3"
    known, summary = runs.read_summary(run_dir), last_summary(found)
    assert summary["best/val_acc"] == summary["val_acc"]["max"] == known["best"]["val_acc"]
    assert summary["final/val_loss"] == known["final"]["val_loss"]
    assert summary["test/acc"] == summary["test_acc"] == known["test"]["test_acc"]
    files = {e["path"]: Path(e["local_path"]) for r in found if "artifact" in r for e in contents(r["artifact"])}
    worst = json.loads(files["worst_mistakes.table.json"].read_text())
    mistakes = runs.read_json(run_dir / "mistakes.json")
    told = mistakes["worst"]
    assert len(worst["data"]) == len(told) > 0
    for row, item in zip(worst["data"], told, strict=True):
        cells = dict(zip(worst["columns"], row, strict=True))
        assert (cells["true"], cells["predicted"], cells["loss"]) == (item["true"], item["predicted"], item["loss"])
        assert files[cells["picture"]["path"]].read_bytes() == (run_dir / item["picture"]).read_bytes()
    matrix = json.loads(files["confusion_matrix_plot_table.table.json"].read_text())["data"]
    assert sum(count for _, _, count in matrix) == mistakes["samples"] and len(matrix) == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("log_model", "expected"),
    [(False, []), ("best", [("best", 1)]), ("all", [("best", 0), ("best", 1), ("best", 1), ("last", 3)])],
)
def test_checkpoints_as_artifacts(boltlab, tmp_path, monkeypatch, log_model, expected):
    """The accuracy is made to be best in the second of three epochs."""
    from boltlab.checkpoints import file as checkpoint_file
    from project.models.classifier import Classifier

    log_dict = Classifier.log_dict
    monkeypatch.setattr(
        Classifier,
        "log_dict",
        lambda self, values, *a, **k: log_dict(
            self,
            {n: [0.5, 0.9, 0.1][self.current_epoch % 3] if n == "val_acc" else v for n, v in values.items()},
            *a,
            **k,
        ),
    )
    begin = WandbLogger.log_hyperparams  # a run that starts late would find the second epoch's file at once
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: (begin(self, params), self._up()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = ["trainer.max_epochs=3", "trainer.accelerator=cpu", f"logger.wandb.log_model={log_model}"]
    code, _, err = boltlab("train", "model=linear", *more)
    assert code == 0, err
    (folder,) = tmp_path.glob("logs/train/*/wandb/offline-run-*")
    artifacts = [r["artifact"] for r in records(folder) if r.get("artifact", {}).get("type") == "model"]
    assert len(artifacts) == len(expected)
    for artifact, (alias, epoch) in zip(artifacts, expected, strict=True):
        steps = json.loads(artifact["metadata"])["global_step"]
        assert {*artifact["aliases"]} == {alias, "latest", f"epoch-{epoch}", f"step-{steps}"}
        (file,) = contents(artifact)
        kept = Path(file["local_path"])  # a copy: best.ckpt may be replaced before the upload
        assert kept.is_relative_to(folder.parent.resolve()) and checkpoint_file.read(kept)["epoch"] == epoch


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="kills a whole group of processes at once")
def test_the_file_of_a_killed_training_reads_almost_to_its_end(tmp_path):
    more = ["model=linear", "trainer.max_epochs=100000", "trainer.accelerator=cpu", "logger=wandb"]
    command = [sys.executable, "-m", "boltlab", "train", *more]
    env = {**os.environ, "WANDB_MODE": "offline"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        pattern = "logs/train/*/wandb/offline-run-*/*.wandb"
        until(lambda: any(len(history(path)) > 10 for path in tmp_path.glob(pattern)), process)
        (found,) = tmp_path.glob(pattern)
        began = time.time()
        until(lambda: history(found)[-1]["_timestamp"] > began, process)  # it grows while the training is at work
    finally:
        killed = time.time()
        os.killpg(process.pid, signal.SIGKILL)  # wandb's own process too
        process.wait()
    rows = history(found)
    assert rows[-1]["_timestamp"] > killed - 30  # 5 on a machine with nothing else to do
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == sorted(steps) and len(steps) > 10


def test_every_logger_is_a_run_of_its_own(tmp_path):
    """As the jobs of a grid, the first of which is left unfinished."""
    loggers = [WandbLogger(tmp_path / name) for name in ("one", "two")]
    for logger in loggers:
        logger.log_hyperparams({"job": Path(logger.save_dir).name})
    for logger in loggers:
        logger.log_metrics({"loss": 1.0}, 0)
    logger.finish()
    jobs = {}
    for name in ("one", "two"):
        found = records(offline_folder(tmp_path / name))
        assert [record["type"] for record in found].count("history") == 1
        jobs[name] = [record["config"]["update"] for record in found if record["type"] == "config"]
    assert jobs == {"one": [{"job": "one"}], "two": [{"job": "two"}]}


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, None])
def test_a_failed_run_says_so(tmp_path, metrics):
    """Also one that fails before it has logged anything but its hyperparameters."""
    logger = WandbLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    if metrics:
        logger.log_metrics(metrics, 0)
    logger.finalize("failed")
    found = records(offline_folder(tmp_path))
    assert found[-1]["exit"]["exit_code"] == 1
    assert [record["config"]["update"] for record in found if record["type"] == "config"] == [{"lr": 0.1}]


def test_logging_does_not_wait_for_the_run_and_nothing_is_lost(tmp_path, monkeypatch):
    may_start, start = threading.Event(), WandbLogger._start

    def held_up(logger):
        assert may_start.wait(HANG)
        return start(logger)

    monkeypatch.setattr(WandbLogger, "_start", held_up)
    logger = WandbLogger(tmp_path)
    params = {"lr": 0.1}
    logger.log_hyperparams(params)
    params["lr"] = 0.2
    metrics = {"loss": 0.0}
    for step in range(3):
        metrics["loss"] = float(step)
        logger.log_metrics(metrics, step)
    logger.log_image("picture", [np.zeros((2, 2, 3), np.uint8)], step=3)
    logged = time.time()
    may_start.set()
    mode = logger.experiment.offline
    logger.log_metrics({"loss": 4.0}, 4)
    logger.finish()

    assert mode is True
    found = records(offline_folder(tmp_path))
    history = [record["history"]["item"] for record in found if record["type"] == "history"]
    assert [row["trainer/global_step"] for row in history] == [0, 1, 2, 3, 4]
    assert [row.get("loss") for row in history] == [0, 1, 2, None, 4]
    assert history[3]["picture.count"] == 1
    assert all(row["_timestamp"] <= logged for row in history[:4]) and history[4]["_timestamp"] >= logged
    assert [record["config"]["update"] for record in found if record["type"] == "config"] == [{"lr": 0.1}]


def test_what_is_logged_while_the_rest_is_handed_over_keeps_its_place(tmp_path, monkeypatch):
    logger = WandbLogger(tmp_path)
    first, go_on, got = threading.Event(), threading.Event(), []

    class Run:
        def log(self, metrics):
            got.append(metrics["trainer/global_step"])
            first.set()
            assert go_on.wait(HANG)

    monkeypatch.setattr(WandbLogger, "_start", lambda logger: Run())
    for step in range(2):
        logger.log_metrics({"loss": 1.0}, step)
    assert first.wait(HANG)
    logger.log_metrics({"loss": 1.0}, 2)
    go_on.set()
    assert logger.experiment.log is not None
    assert isinstance(logger.experiment, Run)
    logger.log_metrics({"loss": 1.0}, 3)
    assert got == [0, 1, 2, 3]


def test_the_run_starts_after_the_first_step_or_while_that_lasts(tmp_path, monkeypatch):
    started = threading.Event()
    monkeypatch.setattr(WandbLogger, "_begin", lambda logger: started.set())
    logger = WandbLogger(tmp_path)
    assert hasattr(logger, "experiment") and logger.experiment is not None  # as Lightning's setup asks
    for name in ("lr", "loss"):  # a callback logs before the step, the model after it
        logger.log_metrics({name: 1.0}, 7)
    assert not started.is_set()
    logger.log_metrics({"loss": 1.0}, 8)
    assert started.is_set()
    started.clear()
    monkeypatch.setattr("boltlab.loggers.wandb._FIRST_STEP_SECONDS", 0.01)
    WandbLogger(tmp_path).log_metrics({"loss": 1.0}, 0)
    assert started.wait(HANG)


def test_a_start_that_fails_is_one_warning_and_training_goes_on(tmp_path, caplog, monkeypatch):
    def fail(logger):
        raise OSError("disk full")

    monkeypatch.setattr(WandbLogger, "_start", fail)
    logger = WandbLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.experiment.summary.update({"best": 1})
    logger.experiment.notes = "a note"
    logger.finish()
    assert warnings_of(caplog) == ["W&B does not record this run (OSError: disk full)"]


def test_a_value_that_wandb_does_not_take_is_one_warning(tmp_path, caplog):
    logger = WandbLogger(tmp_path, mode="disabled")
    logger._log(lambda: print(1 / 0))
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finish()
    assert warnings_of(caplog) == ["W&B does not take what was logged (ZeroDivisionError: division by zero)"]


def test_the_logger_is_copied_with_its_run(tmp_path):
    logger = WandbLogger(tmp_path, mode="offline")
    logger.log_metrics({"loss": 1.0}, 0)
    copied = pickle.loads(pickle.dumps(logger))
    assert copied.version == logger.version == (tmp_path / ".wandb-id").read_text()
    logger.finish()


def start(tmp_path, caplog, **arguments):
    """Starts and ends a run: mode of the run, its one warning (or None), and the seconds that the start took."""
    began = time.monotonic()
    logger = WandbLogger(tmp_path / "run", **arguments)
    logger.log_metrics({"loss": 1.0}, 0)
    assert logger.experiment.id is not None or logger.experiment.disabled  # waits
    seconds = time.monotonic() - began
    logger.log_metrics({"loss": 0.5}, 1)
    mode = "disabled" if logger.experiment.disabled else "offline" if logger.experiment.offline else "online"
    logger.finish()
    if mode == "offline":
        history = [record for record in records(offline_folder(tmp_path / "run")) if record["type"] == "history"]
        assert len(history) == 2
    found = warnings_of(caplog)
    assert len(found) <= 1
    return mode, found[0] if found else None, seconds


def test_the_service_of_a_process_that_is_gone_is_replaced(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/gone")
    mode, warning, _ = start(tmp_path, caplog, mode="offline")
    assert (mode, "as asked for" in warning) == ("offline", True)


def test_a_closed_port(tmp_path, caplog, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    mode, warning, _ = start(tmp_path, caplog)
    assert (mode, "cannot be reached" in warning) == ("offline", True)


def test_a_server_that_accepts_and_never_answers(tmp_path, caplog, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        mode, warning, seconds = start(tmp_path, caplog, timeout_seconds=1.0)
    assert (mode, "does not answer within 1 s" in warning) == ("offline", True)
    assert seconds >= 1


def test_a_key_that_the_server_refuses(tmp_path, caplog, monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server(lambda body: 401))
    mode, warning, _ = start(tmp_path, caplog)
    assert (mode, "refuses the API key" in warning) == ("offline", True)


def test_a_server_that_fails_after_it_took_the_key(tmp_path, caplog, monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server(lambda body: 200 if b"query { viewer { id } }" in body else 500))
    mode, warning, seconds = start(tmp_path, caplog, timeout_seconds=2.0)
    assert (mode, "CommError" in warning) == ("offline", True)
    assert seconds < 60  # as long as wandb would try by itself


def test_a_key_of_the_wrong_form(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    mode, warning, _ = start(tmp_path, caplog)
    assert (mode, "API key must have" in warning) == ("offline", True)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WANDB_MODE", "on"), ("WANDB_BASE_URL", "nonsense"), ("WANDB_API_KEY", "a b\nc"), ("NETRC", None)],
)
def test_a_setting_that_wandb_does_not_take_leaves_the_run_offline(tmp_path, caplog, monkeypatch, variable, value):
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY"):  # put back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if value is None:
        (tmp_path / "netrc").write_text("machine api.wandb.ai login\n password\nfoo bar\n")
        value = str(tmp_path / "netrc")
    monkeypatch.setenv(variable, value)
    mode, warning, _ = start(tmp_path, caplog)
    assert mode == "offline" and "boltlab sync" in warning and "\n" not in warning


@pytest.mark.parametrize(("variable", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_disabled_writes_and_says_nothing(tmp_path, caplog, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert start(tmp_path, caplog)[:2] == ("disabled", None)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("where", ["environment", "argument"])
def test_offline_on_request_asks_no_server(tmp_path, caplog, monkeypatch, server, where):
    asked = []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server(lambda body: asked.append(body) or 500))
    if where == "environment":
        monkeypatch.setenv("WANDB_MODE", "offline")
    mode, warning, _ = start(tmp_path, caplog, mode="offline" if where == "argument" else "auto")
    assert (mode, "as asked for" in warning) == ("offline", True)
    assert asked == []


def test_nothing_starts_before_the_first_use(tmp_path):
    WandbLogger(tmp_path / "run").finalize("success")
    assert not (tmp_path / "run").exists()
