"""One job of a launcher: a process of its own that goes on with a run folder, which alone says what to do.

`python -m boltlab.launchers.process ENTRY FOLDER` is such a process; `Job` starts one in 0.3 s instead of the 5 s that
torch takes to be imported, by forking a server that has imported everything.
"""

import multiprocessing
import os
import sys
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from boltlab import launch, signals, world

OUTPUT = "output.txt"  # of the run folder: what its job prints


def main(entry: str, folder: Path) -> int:
    """Runs `entry` (module:function, which takes the folder and returns the exit code). What it prints goes to
    `output.txt`, added to what is there."""
    with signals.caught():
        if int(os.environ.get("SLURM_PROCID", 0)) == 0:
            _redirect(folder / OUTPUT)
        code = world.run(lambda: int(world.named(entry)(folder)))
        sys.stdout.flush()
        return code


def _redirect(path: Path) -> None:
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)


class Job:
    """A process that goes on with a run folder, forked from a server that has imported all that a training needs.

    Where nothing can be forked (Windows), it is started anew. `variables` are put into its environment.
    """

    def __init__(self, entry: str, folder: Path, variables: dict[str, str], threads: int | None = None) -> None:
        self.folder = folder
        context: Any = multiprocessing.get_context(launch.start_method())
        environment = {**os.environ, **variables}
        self._process: SpawnProcess = context.Process(
            target=_job, args=(entry, str(folder), os.getcwd(), environment, threads)
        )
        self._process.start()

    def send(self, signum: int) -> None:
        """Sends it a signal; one that has ended gets none."""
        if self._process.is_alive() and sys.platform != "win32":
            os.kill(self._process.pid or 0, signum)

    def wait(self) -> int:
        """Its exit code, negative where a signal ended it."""
        self._process.join()
        return self._process.exitcode or 0


def _job(entry: str, folder: str, cwd: str, environment: dict[str, str], threads: int | None) -> None:
    launch.begin_forked(cwd, environment)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    sys.exit(main(entry, Path(folder)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
