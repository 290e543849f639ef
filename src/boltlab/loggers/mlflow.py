"""MLflow that never blocks: a server where it answers, else an SQLite file, which `make tracking-server` shows too."""

import atexit
import copy
import importlib.util
import logging
import os
import queue
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from boltlab.ground import credentials
from boltlab.ground.errors import UserError
from boltlab.ground.files import read_json
from boltlab.loggers.limits import of_mlflow
from boltlab.loggers.place import no_answer, place
from boltlab.loggers.resumed import Points, Rows, earlier, lacking, unknown

log = logging.getLogger(__name__)

RUN_ID = ".mlflow-id"  # of the run folder; with `-local` of what was recorded in the database instead
SAVED_FILES = ("config.yaml", "environment.json", "git.patch")

_LONGEST = 500  # characters of a parameter that every server takes
_PARAMETERS, _METRICS = 100, 1000  # as many as it takes at once


class MLFlowLogger(Logger):
    """Records a run in the order of the calls, from a thread: no step waits for a server, and no failure of one ends a
    training. A server that does not answer at the start is one warning, and the run goes into ``database``; one that
    fails later is one warning, and nothing more is sent (``metrics.csv`` has it all). What waits is sent in one call.

    Where a run was killed and resumes, what MLflow lacks is sent from ``metrics.csv``. It takes nothing back: of steps
    that are done again it keeps the first values, which are the same where nothing was changed.

    Parameters are named by their path (``optimizer/lr``); what a run comes to (``best/val_acc``, ``test/acc``) are
    metrics too. Files of the run folder and pictures are artifacts.

    Args:
        tracking_uri: a server's address, or ``sqlite:///path``; None is ``MLFLOW_TRACKING_URI``, else ``database``.
            Name and password of a server are MLflow's own variables ``MLFLOW_TRACKING_USERNAME`` and ``…_PASSWORD``.
        dir: the run folder; a run that resumes in it is the same MLflow run.
        artifact_dir: where files go that belong to a run in an SQLite file; a server has its own place.
        database: ``sqlite:///path``.
        log_model: "best" keeps the best checkpoint as an artifact at the end of the training, "all" ``last`` too.
        timeout_seconds: how long the server may take until it answers at the start.
        finish_timeout_seconds: how long the end of the run may wait for what is not sent yet.

    Raises:
        UserError: MLflow is not installed.
    """

    check_arguments = staticmethod(of_mlflow)

    def __init__(
        self,
        tracking_uri: str | None,
        dir: str | Path,
        experiment_name: str = "boltlab",
        run_name: str | None = None,
        artifact_dir: str | Path | None = None,
        tags: list[str] | None = None,
        database: str | None = None,
        log_model: Literal[False, "best", "all"] = False,
        timeout_seconds: float = 5.0,
        finish_timeout_seconds: float = 60.0,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise UserError("logger=mlflow needs MLflow: pip install 'boltlab[mlflow]'")
        super().__init__()
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or database or "sqlite:///mlflow.db"
        self._database = database
        self._dir, self._artifact_dir = Path(dir), artifact_dir
        self._experiment_name, self._log_model = experiment_name, log_model
        sweep, kind = place(self._dir)
        name = self._dir.resolve().name
        self._run_name = run_name or (f"{sweep}/{name}" if sweep else name)
        self._tags = dict.fromkeys(tags or [], "true")
        self._tags |= {key: value for key, value in (("sweep", sweep), ("job_type", kind)) if value}
        self._timeout_seconds, self._finish_timeout_seconds = timeout_seconds, finish_timeout_seconds
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._id: str | None = None
        self._goes_on = False
        self._given_up = False
        self._giving_up = threading.Lock()  # nobody sees that it was given up before it was said
        self._step = 0
        self._began = False  # metrics were logged
        self._known: Points = set()  # what this part of the run logs again
        self._batch: list[Any] = []

    @property
    def name(self) -> str:
        return self._experiment_name

    @property
    def version(self) -> str | None:
        return self._id

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, waited for; None where there is none."""
        self._flush()
        return self._id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._later(self._log_parameters, copy.deepcopy(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._began:
            self._began = True
            rows = earlier(self._dir, step)
            self._step = max(rows, default=0)
            self._later(self._fill, rows)
        self._step = self._step if step is None else step
        self._later(self._log_numbers, dict(metrics), self._step, int(time.time() * 1000))

    @rank_zero_only
    def log_summary(self, values: Mapping[str, float]) -> None:
        """What the run comes to: metrics that can be searched, beside the last value of each metric."""
        self.log_metrics(values)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Pictures that are files become artifacts by their own names."""
        for image in images:
            if isinstance(image, str | Path) and Path(image).is_file():
                self._later(self._log_file, Path(image))

    @rank_zero_only
    def log_checkpoint(self, path: Path, alias: str) -> None:
        """Keeps a checkpoint of a training that has ended, if ``log_model`` asks for it."""
        if self._log_model == "all" or (self._log_model == "best" and alias == "best"):
            self._later(self._log_file, path, "checkpoints")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._thread is not None:
            self._later(self._end, "FINISHED" if status in ("success", "finished") else "FAILED")
            self._flush()

    def finish(self) -> None:
        """Waits until all is sent."""
        self.finalize("finished")

    # -- what the thread does

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
            atexit.register(self._flush)
        self._calls.put((call, arguments))

    def _flush(self) -> None:
        """Waits for what was logged until now, but not for ever."""
        with self._giving_up:
            if self._thread is None or self._given_up:
                return
        done = threading.Event()
        self._calls.put((self._send, ()))
        self._calls.put((done.set, ()))
        if not done.wait(self._finish_timeout_seconds):
            self._give_up(f"does not take it within {self._finish_timeout_seconds:g} s")

    def _give_up(self, reason: str) -> None:
        with self._giving_up:
            if not self._given_up:
                self._given_up = True
                log.warning("MLflow does not get the rest of this run (%s)", reason)

    def _work(self) -> None:
        try:
            self._start()
        except Exception as error:  # a tracker must not stop a training
            self._give_up(_said(error))
        while True:
            call, arguments = self._calls.get()
            if self._given_up and call.__name__ != "set":
                continue
            try:
                call(*arguments)
                if self._calls.empty() or len(self._batch) > _METRICS:
                    self._send()
            except Exception as error:
                self._give_up(_said(error))

    def _start(self) -> None:
        # MLflow tells its makers what is used, and tries again for minutes, unless these say otherwise.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow  # noqa: F401  # sets up its loggers

        for package in ("mlflow", "alembic"):
            logging.getLogger(package).setLevel(logging.WARNING)
        if not self._uri.startswith(("http://", "https://")):
            return self._open(self._uri, RUN_ID)
        problem = no_answer("GET", f"{self._uri.rstrip('/')}/health", self._timeout_seconds)
        try:
            if problem is None:
                return self._open(self._uri, RUN_ID)
        except Exception as error:
            problem = _said(error)
        where = credentials.masked(self._uri)
        if self._database is None:
            raise ConnectionError(f"{where}: {problem}")
        self._open(self._database, f"{RUN_ID}-local")
        log.warning("The MLflow server %s cannot be used (%s): this run goes into %s", where, problem, self._database)

    def _open(self, uri: str, kept: str) -> None:
        """Takes up the run that this folder began there, or begins one."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        place = None
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            place = Path(self._artifact_dir).resolve().as_uri() if self._artifact_dir else None
        client = MlflowClient(tracking_uri=uri)
        path = self._dir / kept
        if path.is_file():
            run_id = path.read_text(encoding="utf-8").strip()
            try:
                client.update_run(run_id, status="RUNNING")
                self._client, self._id, self._goes_on = client, run_id, True
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            try:
                client.create_experiment(self._experiment_name, artifact_location=place)
            except MlflowException as error:  # another run was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(self._experiment_name)
        commit = read_json(self._dir / "environment.json").get("git_commit")
        tags = self._tags | ({"mlflow.source.git.commit": commit} if commit else {})
        run = client.create_run(experiment.experiment_id, tags=resolve_tags(tags), run_name=self._run_name)
        self._client, self._id = client, run.info.run_id
        self._dir.mkdir(parents=True, exist_ok=True)
        path.write_text(run.info.run_id, encoding="utf-8")
        for name in SAVED_FILES:
            if (self._dir / name).is_file():
                self._log_file(self._dir / name)

    def _log_parameters(self, params: dict[str, Any] | Namespace) -> None:
        """MLflow keeps a run's parameters as they were first logged: a resumed one logs none again."""
        from mlflow.entities import Param

        if self._goes_on:
            return
        flat = _flatten_dict(_convert_params(params))
        found = [Param(key, str(value)[:_LONGEST]) for key, value in flat.items()]
        for start in range(0, len(found), _PARAMETERS):
            self._client.log_batch(self._id, params=found[start : start + _PARAMETERS])

    def _fill(self, rows: Rows) -> None:
        """Logs what the run lacks of what was logged before this part of it."""
        if self._goes_on:
            names = self._client.get_run(self._id).data.metrics
            histories = (self._client.get_metric_history(self._id, name) for name in names)
            self._known = {(point.key, point.step) for history in histories for point in history}
        now = int(time.time() * 1000)
        for step, values in lacking(rows, self._known).items():
            self._add(values, step, now)

    def _log_numbers(self, metrics: dict[str, float], step: int, milliseconds: int) -> None:
        self._add(unknown(metrics, step, self._known), step, milliseconds)

    def _add(self, metrics: dict[str, float], step: int, milliseconds: int) -> None:
        from mlflow.entities import Metric

        self._batch += [Metric(key, float(value), milliseconds, step) for key, value in metrics.items()]

    def _send(self) -> None:
        batch, self._batch = self._batch, []
        for start in range(0, len(batch), _METRICS):
            self._client.log_batch(self._id, metrics=batch[start : start + _METRICS])

    def _log_file(self, path: Path, below: str | None = None) -> None:
        self._client.log_artifact(self._id, os.fspath(path), below)

    def _end(self, status: str) -> None:
        self._client.set_terminated(self._id, status)


def _said(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return credentials.masked(text.splitlines()[0])[:300]
