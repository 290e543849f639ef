"""Several runs at a time on one machine: joblib's threads, each of which waits for one process after another.

The processes are ours, a fresh one for each run. joblib's own worker processes would go on from run to run, and when
one is killed, all that are at work are lost.
"""

import os
import queue
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from boltlab import runs, signals
from boltlab.errors import UserError
from boltlab.launchers import process


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
        gpus = _gpus() if accelerator in ("auto", "gpu", "cuda") else []
        each = len(gpus_per_job) if isinstance(gpus_per_job, list) else gpus_per_job
        each = each if isinstance(each, int) and each > 0 else max(1, len(gpus))
        if gpus and each > len(gpus):
            raise UserError(f"launcher.gpus_per_job={each}, but there are {len(gpus)} GPUs here")
        self.groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]

    def run(self, top: Path, start: list[Path], watch: list[Path], entry: str) -> None:
        """
        Raises:
            Stopped: this command was told to stop; each run at work has saved and ended, no other has begun.
        """
        from joblib import Parallel, delayed

        groups = self.groups
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_a_time = (len(groups) or min(cores, max(2, cores // 4))) if self.n_jobs == "auto" else self.n_jobs
        at_a_time = min(at_a_time, len(start))
        threads = max(1, cores // max(1, at_a_time)) if self.threads_per_job == "auto" else self.threads_per_job
        places: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for i in range(at_a_time):
            places.put(groups[i % len(groups)] if groups else [])
        jobs: list[process.Job] = []

        def told() -> int:  # to stop, by the signal of that number
            return signals.inbox.stop

        def one(folder: Path) -> None:
            if told():
                return
            place = places.get()
            variables = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": ",".join(place)} if place else {})
            job = process.Job(entry, folder, variables, threads)
            jobs.append(job)
            if told():  # while the process was started
                job.send(told())
            where = f" on GPU {','.join(place)}" if place else ""
            print(f"{folder.name} begins{where}: {runs.shown(folder / process.OUTPUT)}", flush=True)
            job.wait()
            places.put(place)
            print(f"{folder.name} {runs.status(runs.read_summary(folder), folder)}", flush=True)

        def forward(signum: int) -> None:
            for job in jobs:
                job.send(signum)

        with signals.caught(at_once=lambda _: forward(9), forward=forward):
            Parallel(n_jobs=at_a_time, prefer="threads")(delayed(one)(folder) for folder in start)
            stopped = told()
        if stopped:
            raise signals.Stopped(stopped)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here."""
    import torch

    if torch.cuda.device_count() == 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else [n for n in named.split(",") if n]
