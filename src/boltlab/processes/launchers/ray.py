"""Runs as tasks of Ray, on this machine or on a cluster of it whose nodes share the folders."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from boltlab import runs
from boltlab.ground import signals, started_by
from boltlab.ground.errors import UserError
from boltlab.processes.launchers import process


class Ray:
    """
    address: of a running cluster (`auto`, or ray://host:10001); null starts one on this machine and ends it.
    num_cpus, num_gpus: of each run; Ray lets it see its own GPUs only.
    resources: other resources that a run asks for, by their names in the cluster.

    Raises:
        UserError: Ray is not installed.
    """

    watches = False

    def __init__(
        self,
        address: str | None = None,
        num_cpus: Annotated[float, Ge(0)] = 1,
        num_gpus: Annotated[float, Ge(0)] = 0,
        resources: dict[str, float] | None = None,
    ) -> None:
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError:
            raise UserError("launcher=ray needs the package ray: pip install 'boltlab[ray]'") from None
        self.address = address
        self.asked: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources or None}

    def run(self, top: Path, start: list[Path], watch: list[Path], entry: str) -> None:
        """
        Raises:
            Stopped: this command was told to stop; each run at work has saved and ended, no other has begun.
        """
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # num_gpus=0 asks for no GPU, and hides none
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if self.address is None else {}
        ray.init(self.address, log_to_driver=False, **own)
        task = ray.remote(max_retries=0, **self.asked)(_train)
        tasks = {task.remote(entry, str(folder), os.getcwd()): folder for folder in start}
        left = list(tasks)
        print(f"{len(left)} tasks given to Ray; each writes {process.OUTPUT} in its run folder", flush=True)
        try:
            with signals.passed_on(lambda _: None):
                while left and not signals.inbox.stop:
                    done, left = ray.wait(left, timeout=0.5)
                    for reference in done:
                        folder = tasks[reference]
                        print(f"{folder.name} {runs.status(runs.read_summary(folder), folder)}", flush=True)
                for reference in left:
                    ray.cancel(reference, force=False)
                if left:
                    ray.wait(left, num_returns=len(left), timeout=120)
        finally:
            ray.shutdown()


def _train(entry: str, folder: str, cwd: str) -> int:
    """A task: the run is a process of its own, which Ray's handlers of signals and its worker's memory do not reach."""
    command = [sys.executable, "-m", "boltlab.processes.launchers.process", entry, folder]
    with subprocess.Popen(command, cwd=cwd, env=started_by.alone(os.environ)) as run:
        while run.poll() is None:
            try:
                time.sleep(0.2)  # and not in `wait`, which what `ray.cancel` raises does not reach
            except KeyboardInterrupt:
                with suppress(ProcessLookupError):
                    run.send_signal(signal.SIGTERM)
        return run.returncode
