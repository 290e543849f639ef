"""Several runs at a time on one machine: threads, each of which waits for one process after another.

Each run has a fresh process. The worker processes of the package joblib would go on from run to run, and when one is
killed, all that are at work are lost.
"""

from concurrent.futures import ThreadPoolExecutor
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
        pool = process.Pool(process.places(self.groups, self.n_jobs, self.threads_per_job, most=len(start)))

        def one(folder: Path) -> None:
            with pool.place() as place:
                if signals.inbox.stop:
                    return
                with pool.job(entry, folder, place) as job:
                    where = f" on GPU {','.join(place.gpus)}" if place.gpus else ""
                    print(f"{folder.name} begins{where}: {runs.shown(folder / process.OUTPUT)}", flush=True)
                    job.wait()
            print(f"{folder.name} {runs.status(runs.read_summary(folder), folder)}", flush=True)

        with signals.passed_on(pool.send), ThreadPoolExecutor(pool.size) as threads:
            list(threads.map(one, start))
