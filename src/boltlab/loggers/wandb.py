"""Weights & Biases that never asks and never blocks: online where that works, else offline with the line to sync."""

import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.wandb import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from wandb.sdk.lib import RunDisabled
    from wandb.wandb_run import Run

Mode = Literal["online", "offline", "disabled"]

log = logging.getLogger(__name__)

SAVED_FILES = ("environment.json", "git.patch")


class WandbLogger(LightningWandbLogger):
    """Lightning's logger with its own start and end of the W&B run.

    The run starts at the first use, on rank zero. It is online if W&B finds an API key (``WANDB_API_KEY``, netrc, its
    settings files) and the server takes it within ``timeout_seconds``. Otherwise it is recorded below ``<dir>/wandb``
    and one warning says why and how to upload it. ``mode``, and before it ``WANDB_MODE``, decide beforehand.
    Each logger is one W&B run: what an earlier job of this process left open is finished first. ``environment.json``
    and ``git.patch`` of ``dir`` are saved in the run; its config is what ``log_hyperparams`` gets, nested as it is.

    Args:
        dir: the run folder.
        entity: user or team; None is the default of the account.
        name: shown name; None is the name of the run folder.
        id: a W&B run to continue.
        timeout_seconds: how long the server may take until the run is online.
        finish_timeout_seconds: how long the end of the run may wait for uploads; what is left stays below ``dir``.
    """

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
    ) -> None:
        super().__init__(
            save_dir=dir,
            project=project,
            entity=entity,
            name=name or Path(dir).resolve().name,
            group=group,
            tags=tags,
            id=id,
        )
        self._dir = Path(dir)
        self._mode = mode
        self._timeout_seconds = timeout_seconds
        self._finish_timeout_seconds = finish_timeout_seconds

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run | RunDisabled":
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Ends the W&B run; a run that is not finished here ends with the process."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        # After a successful fit comes test, which logs to the same run: only a failure ends it here.
        super().finalize(status)
        if status != "success":
            self.finish(exit_code=1)

    def _start(self) -> "Run | RunDisabled":
        import wandb

        deadline = time.monotonic() + self._timeout_seconds
        if wandb.run is not None:
            wandb.finish()
        # wandb's telemetry about itself asks the server for offline runs too, and holds up the exit where none answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with suppress(ImportError):
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()
        wandb.setup(wandb.Settings(silent=True))
        mode, reason = self._choose_mode(deadline)
        run = None
        if mode == "online":
            try:
                run = self._init("online", init_timeout=max(1.0, deadline - time.monotonic()))
            except wandb.Error as error:
                mode, reason = "offline", f"{type(error).__name__}: {error}".splitlines()[0]
        if run is None:
            run = self._init(mode)
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        for name in SAVED_FILES:
            if (path := self._dir / name).exists():
                run.save(path, base_path=path.parent, policy="now")
        if mode == "offline":
            folder = os.path.relpath(run.settings.sync_dir)
            log.warning("W&B is offline (%s). To upload this run: wandb sync '%s'", reason, folder)
        return run

    def _init(self, mode: Mode, init_timeout: float = 10.0) -> "Run | RunDisabled":
        import wandb

        environment = self._dir / "environment.json"
        git_commit = json.loads(environment.read_text()).get("git_commit") if environment.exists() else None
        settings = wandb.Settings(
            silent=True,
            git_commit=git_commit,  # wandb's own look finds none where the run folder lies outside the repository
            console="off",  # a progress bar's redraws would fill the log; metrics.csv and the terminal have the rest
            init_timeout=init_timeout,
            finish_timeout=self._finish_timeout_seconds,
        )
        # _wandb_init is what the base class has gathered for this call.
        return wandb.init(**{**self._wandb_init, "mode": mode, "settings": settings})

    def _choose_mode(self, deadline: float) -> tuple[Mode, str]:
        """The mode of ``wandb.init``, and for "offline" why."""
        import wandb

        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "disabled", ""
        asked = os.environ.get("WANDB_MODE") or (self._mode if self._mode != "auto" else wandb.setup().settings.mode)
        if asked in ("disabled", "offline", "dryrun"):
            return ("disabled", "") if asked == "disabled" else ("offline", "as asked for")
        try:
            if not wandb.login(prompt=False, verify=False):
                return "offline", "no API key; `wandb login` saves one"
        except wandb.Error as error:  # a key of the wrong form
            return "offline", str(error)
        settings = wandb.setup().settings
        problem = _ask_server(settings.base_url, settings.api_key, deadline - time.monotonic())
        return ("offline", problem) if problem else ("online", "")


def _ask_server(base_url: str, api_key: str | None, timeout_seconds: float) -> str | None:
    """What keeps the W&B server from taking the key, or None. wandb's own check retries a refused connection until
    its timeout is over; this one returns at once."""
    import requests  # comes with wandb

    problems = [f"{base_url} does not answer within {timeout_seconds:.0f} s"]

    def ask() -> None:
        try:
            answer = requests.post(
                f"{base_url}/graphql",
                json={"query": "query { viewer { id } }"},
                auth=("api", api_key) if api_key else None,
                timeout=timeout_seconds,
            )
        except requests.Timeout:
            return
        except requests.RequestException as error:
            problems[0] = f"{base_url} cannot be reached: {type(error).__name__}"
            return
        if answer.status_code in (401, 403):
            problems[0] = f"{base_url} refuses the API key"
        elif not answer.ok:
            problems[0] = f"{base_url} answers with HTTP status {answer.status_code}"
        else:
            problems.clear()

    # In a thread, because looking up a name and a slow stream of bytes know no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return problems[0] if problems else None
