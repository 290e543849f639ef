"""Weights & Biases that never asks and never blocks: online where that works, else offline with the line to sync."""

import copy
import itertools
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers.wandb import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from boltlab.ground.files import read_json
from boltlab.loggers.limits import of_wandb
from boltlab.loggers.place import place
from boltlab.loggers.resumed import Rows, earlier, unknown
from boltlab.loggers.wandb_server import refusal, set_aside

if TYPE_CHECKING:
    from torch import Tensor
    from wandb.sdk.lib import RunDisabled
    from wandb.wandb_run import Run

Mode = Literal["online", "offline", "disabled"]

log = logging.getLogger(__name__)

RUN_ID = ".wandb-id"  # of the run folder: a resumed run is the same W&B run
SAVED_FILES = ("environment.json", "git.patch")

MAX_PLOTTED_CLASSES = 100  # W&B's plot gets a row for each cell of the matrix

_FIRST_STEP_SECONDS = 10.0

_lock = threading.Lock()  # of what waits for a run that is not up yet
_newest: "WandbLogger | None" = None  # the last one of this process
_staged: str | None = None  # where the last one keeps the files of artifacts until they are uploaded


class WandbLogger(LightningWandbLogger):
    """Lightning's logger with its own start and end of the W&B run.

    The run starts on rank zero, in a thread, when metrics of a second step are logged (or that takes ten seconds): the
    first step waits neither for the import of wandb nor for its service and server. What is logged until the run is up
    follows in order and with its time; what uses ``experiment``, ``finalize`` and ``finish`` wait for it.

    The run is online if W&B finds an API key (``WANDB_API_KEY``, netrc, its settings files) and the server takes it
    within ``timeout_seconds``. Otherwise it is recorded below ``<dir>/wandb`` and one warning says why and how to
    upload it. ``mode``, and before it ``WANDB_MODE``, decide beforehand. Each logger is one W&B run: what an earlier
    job of this process left open is finished first. ``environment.json`` and ``git.patch`` of ``dir`` are saved in the
    run; its config is what ``log_hyperparams`` gets, nested as it is. Its summary holds the last value of each metric,
    of the monitored one also the best (``val_acc.max``), and what ``log_summary`` gets.

    Args:
        dir: the run folder.
        entity: user or team; None is the default of the account.
        name: shown name; None is the name of the run folder, in a sweep with the sweep's before it.
        group: None is the name of the sweep's folder, for a run of a sweep.
        job_type: None is "train", "eval", or "trial" for a run of a sweep.
        monitor: the metric whose best value stands in the summary, by ``monitor_mode``.
        log_model: "best" uploads the best checkpoint at the end of the training as an artifact ``model-<run id>``
            with the aliases ``best``, ``epoch-<n>`` and ``step-<n>``; "all" each new best one, and ``last`` at the end.
        id: a W&B run to continue; None is the one that this run folder began, or a new one.
        timeout_seconds: how long the server may take until the run is online.
        finish_timeout_seconds: how long the end of the run may wait for uploads; what is left stays below ``dir``.
    """

    check_arguments = staticmethod(of_wandb)

    def __init__(
        self,
        dir: str | Path,
        project: str = "boltlab",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        id: str | None = None,
        mode: Literal["auto", "offline", "disabled"] = "auto",
        timeout_seconds: float = 8.0,
        finish_timeout_seconds: float = 60.0,
        job_type: str | None = None,
        monitor: str | None = None,
        monitor_mode: Literal["min", "max"] = "max",
        log_model: Literal[False, "best", "all"] = False,
    ) -> None:
        kept = Path(dir) / RUN_ID
        if id is None and kept.is_file():
            id = kept.read_text(encoding="utf-8").strip()
        sweep, kind = place(Path(dir))
        own_name = Path(dir).resolve().name
        super().__init__(
            save_dir=dir,
            project=project,
            entity=entity,
            name=name or (f"{sweep}/{own_name}" if sweep else own_name),
            group=group or sweep,
            job_type=job_type or kind,
            tags=tags,
            id=id,
        )
        self._dir, self._mode = Path(dir), mode
        self._began = False  # metrics were logged
        self._known: set[tuple[str, int]] = set()  # what this part of the run logs again
        self._monitor, self._monitor_mode = monitor, monitor_mode
        self._checkpoints = log_model  # the base class would upload by its own rules
        self._timeout_seconds, self._finish_timeout_seconds = timeout_seconds, finish_timeout_seconds
        self._run: Run | RunDisabled | None = None  # `_experiment` once it has got all that waits for it
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._steps: set[int | None] = set()  # logged before the thread was started
        self._thread: threading.Thread | None = None
        self._refused = ""  # why the first start failed
        self._earlier: WandbLogger | None = None  # of another job of this process: its run comes first

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run | RunDisabled":
        if self._experiment is None and threading.current_thread() is self._thread:
            return cast("Run", self._run)
        return self._experiment or cast("Run", _WhenUp(self))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._log(super().log_hyperparams, copy.deepcopy(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._experiment is None:
            metrics = {**metrics, "_timestamp": time.time()}
        if not self._began and step is not None:
            self._began = True
            self._log(self._fill, earlier(self._dir, step))
        self._log(self._log_new, metrics, step)
        if self._thread is None:
            if not self._steps:
                timer = threading.Timer(_FIRST_STEP_SECONDS, self._begin)
                timer.daemon = True
                timer.start()
            self._steps.add(step)
            if len(self._steps) > 1:
                self._begin()

    def _fill(self, rows: Rows) -> None:
        """Logs what earlier parts of the run have lost when they were killed."""
        from boltlab.loggers import wandb_file

        lost, self._known = wandb_file.lost(self._dir / "wandb", self.experiment.id, rows)
        for step, values in lost.items():
            super().log_metrics(values, step)

    def _log_new(self, metrics: dict[str, Any], step: int | None) -> None:
        if self._known and step is not None:
            metrics = unknown(metrics, step, self._known)
        if metrics.keys() - {"_timestamp"}:
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_summary(self, values: Mapping[str, float]) -> None:
        """What the run comes to, beside the last value of each metric."""
        self._log(lambda found: self.experiment.summary.update(found), dict(values))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """A table; a cell that is a ``Path`` is shown as the picture that lies there."""
        import wandb

        if data is not None:
            data = [[wandb.Image(os.fspath(c)) if isinstance(c, Path) else c for c in row] for row in data]
        super().log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_confusion_matrix(self, key: str, matrix: "Tensor", class_names: list[str]) -> None:
        """W&B's own plot of the counts, int64 [true class, predicted class], with the table behind it."""
        if len(class_names) > MAX_PLOTTED_CLASSES:
            return
        import wandb

        columns = ["Actual", "Predicted", "nPredictions"]
        cells = zip(itertools.product(class_names, class_names), matrix.flatten().tolist(), strict=True)
        table = wandb.Table(columns=[*columns], data=[[true, predicted, count] for (true, predicted), count in cells])
        fields = {column: column for column in columns}
        plot = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": key})
        self.log_metrics(cast("Any", {key: plot}))

    @rank_zero_only
    def log_checkpoint(self, path: Path, alias: str) -> None:
        """Uploads a checkpoint of a training that has ended, if ``log_model`` asks for it."""
        if self._checkpoints == "all" or (self._checkpoints == "best" and alias == "best"):
            self._log(self._log_artifact, path, alias)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        # A ModelCheckpoint whose newest file is its best one: Lightning calls this after each save.
        newest = getattr(checkpoint_callback, "best_model_path", "")
        if self._checkpoints == "all" and newest and newest == checkpoint_callback._last_checkpoint_saved:
            self._log(self._log_artifact, Path(newest), "best")

    def _log_artifact(self, path: Path, alias: str) -> None:
        import torch
        import wandb

        run = self.experiment
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        copy = artifact.add_file(os.fspath(path), name="model.ckpt").local_path  # the file itself may be replaced
        content = torch.load(cast("str", copy), map_location="cpu", weights_only=True, mmap=True)
        place = {key: content[key] for key in ("epoch", "global_step")}
        artifact.metadata = {**place, "monitor": self._monitor}
        run.log_artifact(artifact, aliases=[alias, f"epoch-{place['epoch']}", f"step-{place['global_step']}"])

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Ends the W&B run; a run that is not finished here ends with the process."""
        if self._waiting or self._thread:
            self._up().finish(exit_code=exit_code)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        # After a successful fit comes test, which logs to the same run: only a failure ends it here.
        super().finalize(status)
        if status != "success":
            self.finish(exit_code=1)
        elif self._steps:
            self._up()  # an evaluation ends the process next

    def __getstate__(self) -> dict[str, Any]:
        self._up()
        return {**super().__getstate__(), "_run": None, "_thread": None, "_earlier": None}

    def _log(self, call: Callable[..., None], *arguments: Any) -> None:
        global _newest
        with _lock:
            if self._thread is None and not self._waiting:  # the first
                self._earlier, _newest = _newest, self
            if waits := self._experiment is None:
                self._waiting.append((call, arguments))
        if not waits:
            self._give(call, arguments)

    def _give(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            call(*arguments)
        except Exception as error:  # a tracker must not stop a training
            log.warning("W&B does not take what was logged (%s: %s)", type(error).__name__, error)

    def _begin(self) -> threading.Thread:
        """Starts the run's thread if there is none yet. It is no daemon: the process does not end in its midst."""
        with _lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._bring_up, name="wandb start")
                self._thread.start()
        return self._thread

    def _up(self) -> "Run | RunDisabled":
        """The run, waited for."""
        self._begin().join()
        return cast("Run", self._experiment)

    def _bring_up(self) -> None:
        """Starts the run after that of an earlier job of this process, and gives it all that waits."""
        if self._earlier is not None:
            self._earlier._up()
            self._earlier = None
        try:
            try:
                self._run = self._start()
            except Exception as error:
                self._refused = set_aside(error)
                self._run = self._start()
        except Exception as error:  # a tracker must not stop a training
            log.warning("W&B does not record this run (%s)", _said(error))
            self._run = cast("RunDisabled", _DummyExperiment())
            with suppress(Exception):
                self._run = self._init("disabled")
        while True:
            with _lock:
                waiting, self._waiting = self._waiting, []
                if not waiting:
                    self._experiment = self._run
                    return
            for call, arguments in waiting:
                self._give(call, arguments)

    def _start(self) -> "Run | RunDisabled":
        import wandb

        deadline = time.monotonic() + self._timeout_seconds
        if wandb.run is not None:
            wandb.finish()
        self._start_service()
        run, mode, reason = self._connect(deadline)
        if mode != "disabled":
            self._dir.mkdir(parents=True, exist_ok=True)
            (self._dir / RUN_ID).write_text(run.id or "", encoding="utf-8")
        run.define_metric("trainer/global_step")
        by_step: Any = {"step_metric": "trainer/global_step", "step_sync": True}
        run.define_metric("*", **by_step)
        if self._monitor is not None:
            run.define_metric(self._monitor, **by_step, summary=f"last,{self._monitor_mode}")
        for name in SAVED_FILES:
            if (path := self._dir / name).exists():
                run.save(path, base_path=path.parent, policy="now")
        if mode == "offline":
            log.warning(
                "W&B is offline (%s). To upload this run: boltlab sync '%s'", reason, os.path.relpath(self._dir)
            )
        return run

    def _start_service(self) -> None:
        import wandb

        # wandb's telemetry about itself asks the server for offline runs too, and holds up the exit where none answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with suppress(ImportError):
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()
        try:
            wandb.setup(wandb.Settings(silent=True))
        except Exception:
            if os.environ.pop("WANDB_SERVICE", None) is None:
                raise
            wandb.setup(wandb.Settings(silent=True))  # it named the service of a process that is gone

    def _connect(self, deadline: float) -> "tuple[Run | RunDisabled, Mode, str]":
        """The run, its mode, and for "offline" why."""
        import wandb

        mode, reason = self._choose_mode(deadline)
        if mode == "online":
            try:
                return self._init("online", init_timeout=max(1.0, deadline - time.monotonic())), mode, reason
            except wandb.Error as error:
                mode, reason = "offline", _said(error)
                if self._wandb_init["id"]:
                    wandb.teardown()  # its service calls the id of a resumed run taken
        return self._init(mode), mode, reason

    def _init(self, mode: Mode, init_timeout: float = 60.0) -> "Run | RunDisabled":  # a busy machine starts it late
        global _staged
        import wandb

        if mode == "offline" and os.environ.get("WANDB_DATA_DIR") == _staged:
            # Tables and checkpoints wait here for `wandb sync`, and not in a home folder that a node may lose.
            os.environ["WANDB_DATA_DIR"] = _staged = os.fspath((self._dir / "wandb").resolve())
        settings = wandb.Settings(
            silent=True,
            # wandb's own look finds none where the run folder lies outside the repository
            git_commit=read_json(self._dir / "environment.json").get("git_commit"),
            console="off",  # a progress bar's redraws would fill the log; metrics.csv and the terminal have the rest
            init_timeout=init_timeout,
            finish_timeout=self._finish_timeout_seconds,
        )
        # _wandb_init is what the base class has gathered for this call.
        return wandb.init(**{**self._wandb_init, "mode": mode, "settings": settings})

    def _choose_mode(self, deadline: float) -> tuple[Mode, str]:
        """The mode of ``wandb.init``, and for "offline" why."""
        import wandb

        if self._refused:
            return "offline", self._refused
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "disabled", ""
        asked = os.environ.get("WANDB_MODE") or (self._mode if self._mode != "auto" else wandb.setup().settings.mode)
        if asked in ("disabled", "offline", "dryrun"):
            return ("disabled", "") if asked == "disabled" else ("offline", "as asked for")
        problem = refusal(deadline - time.monotonic())
        return ("offline", problem) if problem else ("online", "")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _WhenUp:
    """Stands for a run that is not up yet, and waits for it where it is used: Lightning asks for ``experiment`` before
    the first step, and does nothing with it."""

    def __init__(self, logger: WandbLogger) -> None:
        self.__dict__["_logger"] = logger

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_logger"]._up(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_logger"]._up(), name, value)
