"""One job of a launcher: a process of its own that resumes a run folder, which alone says what to do.

`python -m boltlab.processes.launchers.process ENTRY FOLDER` is such a process; `Job` starts one in 0.3 s, by forking a
server that has imported everything, instead of the 5 s that importing torch takes.
"""

import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from boltlab.ground import signals, started_by
from boltlab.ground.errors import UserError
from boltlab.processes import several
from boltlab.processes.exits import leave, led

OUTPUT = "output.txt"  # of the run folder: what its job prints


def main(entry: str, folder: Path) -> int:
    """Runs `entry` (module:function, which takes the folder and returns the exit code). What it prints goes to
    `output.txt`, added to what is there."""
    with signals.caught():
        if int(os.environ.get("SLURM_PROCID", 0)) == 0:
            with (folder / OUTPUT).open("ab") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
        code = led(lambda: int(pkgutil.resolve_name(entry)(folder)))
        sys.stdout.flush()
        return code


@dataclass(frozen=True)
class Place:
    """Where one job at a time is at work: the GPUs that it sees (none named: what there is), threads of CPU kernels."""

    gpus: tuple[str, ...]
    threads: int

    def variables(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return threads | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def gpu_groups(each: Any, accelerator: str) -> list[tuple[str, ...]]:
    """The GPUs of this machine in groups of as many as a job takes, if it takes any. each: a Trainer's devices.

    Raises:
        UserError: it takes more than there are.
    """
    gpus = _gpus() if accelerator in ("auto", "gpu", "cuda") else []
    each = len(each) if isinstance(each, list) else each
    each = each if isinstance(each, int) and each > 0 else max(1, len(gpus))
    if gpus and each > len(gpus):
        raise UserError(f"gpus_per_job={each}, but there are {len(gpus)} GPUs here: see trainer.devices")
    return [tuple(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]


def places(
    groups: list[tuple[str, ...]],
    number: int | Literal["auto"],
    threads: int | Literal["auto"] = "auto",
    most: float = float("inf"),
) -> list[Place]:
    """So many places; auto is one for each group of GPUs, without GPUs one for four cores, but two. With more places
    than groups, jobs share GPUs. threads: auto divides the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = (len(groups) or min(cores, max(2, cores // 4))) if number == "auto" else number
    count = max(1, int(min(count, most)))
    each = max(1, cores // count) if threads == "auto" else threads
    return [Place(groups[i % len(groups)] if groups else (), each) for i in range(count)]


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here."""
    import torch

    if torch.cuda.device_count() == 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else [n for n in named.split(",") if n]


class Job:
    """A process that resumes a run folder, forked from a server that has imported all that a training needs.

    Where nothing can be forked (Windows), it is started anew. `variables` are put into its environment.
    """

    def __init__(self, entry: str, folder: Path, variables: dict[str, str], threads: int | None = None) -> None:
        self.folder = folder
        context: Any = multiprocessing.get_context(several.start_method())
        environment = {**os.environ, **variables}
        self._process: SpawnProcess = context.Process(
            target=_job, args=(entry, str(folder), os.getcwd(), environment, threads, os.getpid())
        )
        with several.nothing_to_import():
            self._process.start()

    def send(self, signum: int) -> None:
        """Sends it a signal; one that has ended gets none."""
        if self._process.is_alive() and sys.platform != "win32":
            os.kill(self._process.pid or 0, signum)

    def running(self, seconds: float) -> bool:
        """Whether it is still at work, after so long or as soon as it has ended."""
        self._process.join(seconds)
        return self._process.is_alive()

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        self._process.join()
        return self._process.exitcode or 0


class Pool:
    """The places of this machine, each for one job at a time, and the jobs that are at work."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.size = len(places)
        self._jobs: list[Job] = []
        self._free: SimpleQueue[Place] = SimpleQueue()
        for place in places:
            self._free.put(place)

    def send(self, signum: int) -> None:
        for job in list(self._jobs):
            job.send(signum)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Waits for a place, which is free again afterwards."""
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)

    @contextmanager
    def job(self, entry: str, folder: Path, place: Place) -> Iterator[Job]:
        """Starts a job, which ends here: one that is still at work then is told to stop."""
        job = Job(entry, folder, place.variables(), place.threads)
        self._jobs.append(job)
        try:
            if signals.inbox.stop:  # while the process was started
                job.send(signals.inbox.stop)
            yield job
        finally:
            job.send(signal.SIGTERM)
            job.wait()
            self._jobs.remove(job)


def _job(entry: str, folder: str, cwd: str, environment: dict[str, str], threads: int | None, parent: int) -> None:
    started_by.parent = parent
    several.begin_forked(cwd, environment)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    sys.exit(main(entry, Path(folder)))


if __name__ == "__main__":
    leave(main(sys.argv[1], Path(sys.argv[2])))
