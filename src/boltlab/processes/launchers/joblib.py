"""Several runs at a time on one machine: joblib's threads, each of which waits for one process after another.

The processes are ours, a fresh one for each run. joblib's own worker processes would go on from run to run, and when
one is killed, all that are at work are lost.
"""

import queue
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from boltlab import runs
from boltlab.ground import signals
from boltlab.processes.launchers import process


class Joblib:
    """
    n_jobs: runs at a time. auto: one for each group of `gpus_per_job` GPUs; without GPUs, one for four cores, but two.
    gpus_per_job: where the runs take GPUs, each sees so many of them (CUDA_VISIBLE_DEVICES): the devices of its
        Trainer, or a list of them; auto is all. With more runs at a time than groups of GPUs, runs share them.
    accelerator: of the Trainer.
    threads_per_job: of each run's CPU kernels. auto: the cores divided by n_jobs.
    """

    watches = False

    def __init__(
        self,
        n_jobs: Annotated[int, Ge(1)] | Literal["auto"] = "auto",
        gpus_per_job: Any = 1,
        accelerator: str = "auto",
        threads_per_job: Annotated[int, Ge(1)] | Literal["auto"] = "auto",
    ) -> None:
        self.n_jobs, self.threads_per_job = n_jobs, threads_per_job
        self.groups = process.gpu_groups(gpus_per_job, accelerator)

    def run(self, top: Path, start: list[Path], watch: list[Path], entry: str) -> None:
        """
        Raises:
            Stopped: this command was told to stop; each run at work has saved and ended, no other has begun.
        """
        from joblib import Parallel, delayed

        there = process.places(self.groups, self.n_jobs, self.threads_per_job, most=len(start))
        places: queue.SimpleQueue[process.Place] = queue.SimpleQueue()
        for place in there:
            places.put(place)
        jobs: list[process.Job] = []

        def told() -> int:  # to stop, by the signal of that number
            return signals.inbox.stop

        def one(folder: Path) -> None:
            if told():
                return
            place = places.get()
            job = process.Job(entry, folder, place.variables(), place.threads)
            jobs.append(job)
            if told():  # while the process was started
                job.send(told())
            where = f" on GPU {','.join(place.gpus)}" if place.gpus else ""
            print(f"{folder.name} begins{where}: {runs.shown(folder / process.OUTPUT)}", flush=True)
            job.wait()
            places.put(place)
            print(f"{folder.name} {runs.status(runs.read_summary(folder), folder)}", flush=True)

        def forward(signum: int) -> None:
            for job in jobs:
                job.send(signum)

        with signals.caught(at_once=lambda _: forward(9), forward=forward):
            Parallel(n_jobs=len(there), prefer="threads")(delayed(one)(folder) for folder in start)
            stopped = told()
        if stopped:
            raise signals.Stopped(stopped)
