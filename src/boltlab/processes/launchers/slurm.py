"""Runs as jobs of Slurm: submitit writes and submits the job scripts, one array for all runs.

In the job, each task that `srun` starts becomes (`exec`) a process of ours: submitit's own handling of signals, its
pickled results and its requeueing stay out of it. A job that is requeued, by Slurm because of another partition or a
broken node, by `scontrol requeue`, or by itself at its time limit, resumes from the newest checkpoint.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.ground import signals, started_by
from boltlab.ground.errors import UserError
from boltlab.ground.signals import Stopped
from boltlab.processes.exits import leave
from boltlab.processes.launchers import process

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")


class Slurm:
    """Starts each run as a job. The names are those of submitit and sbatch; null leaves it to the cluster.

    array_parallelism: how many runs are at work at a time.
    signal_delay_s: before the time limit, the run saves and is queued again (`requeue`), or ends.
    setup: shell lines before the run (`module load …`). additional_parameters: any other option of sbatch.
    wait: stay and show what changes; else the command ends when the jobs are in the queue.

    Raises:
        UserError: submitit or Slurm is not installed.
    """

    watches = True  # the same command again watches what is in the queue

    def __init__(
        self,
        partition: str | None = None,
        timeout_min: int = 1440,
        nodes: int = 1,
        tasks_per_node: Any = 1,
        gpus_per_node: int | str | None = None,
        cpus_per_task: int | None = None,
        mem_gb: float | None = None,
        constraint: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        requeue: bool = True,
        array_parallelism: int = 256,
        signal_delay_s: int = 120,
        setup: list[str] | None = None,
        additional_parameters: dict[str, Any] | None = None,
        wait: bool = True,
        poll_seconds: float = 5.0,
    ) -> None:
        absent = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if absent:
            raise UserError(
                f"launcher=slurm: there is no {', '.join(absent)} here. Start it on a login node of a Slurm cluster,"
                " or take launcher=joblib for this machine"
            )
        try:
            import submitit  # noqa: F401
        except ModuleNotFoundError:
            raise UserError("launcher=slurm needs the package submitit: pip install 'boltlab[slurm]'") from None
        self.requeue, self.wait, self.poll_seconds = requeue, wait, poll_seconds
        more = {"requeue": True} if requeue else {"no-requeue": True}
        options: dict[str, Any] = {"signal": f"USR1@{signal_delay_s}", **more, **(additional_parameters or {})}
        if isinstance(gpus_per_node, str):  # "a100:4"
            options["gpus-per-node"] = gpus_per_node
            gpus_per_node = None
        slurm = {
            "partition": partition,
            "constraint": constraint,
            "account": account,
            "qos": qos,
            "setup": setup or None,
            "array_parallelism": array_parallelism,
            # srun has not taken this from sbatch since Slurm 22.05
            "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else [])],
            "additional_parameters": options,
        }
        self.parameters = {
            "timeout_min": timeout_min,
            "nodes": nodes,
            "tasks_per_node": tasks_per_node,
            "gpus_per_node": gpus_per_node,
            "cpus_per_task": cpus_per_task,
            "mem_gb": mem_gb,
            **{f"slurm_{key}": value for key, value in slurm.items()},
        }

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        tasks = arguments.get("tasks_per_node", 1)
        if isinstance(tasks, int) and not isinstance(tasks, bool) and tasks > 0:
            return []
        return [("tasks_per_node", "is trainer.devices, which the cluster is to know beforehand: trainer.devices=4")]

    def run(self, top: Path, start: list[Path], watch: list[Path], entry: str) -> None:
        """Submits the run folders `start`, and returns when they and those of `watch` have ended.

        Raises:
            UserError: Slurm refused them; none was submitted.
            Stopped: this command was told to stop; the jobs stay in the queue.
        """
        if start:
            self._submit(top, start, entry)
        if not self.wait:
            print("the jobs are in the queue: `boltlab runs` shows them, the same command again watches them")
            return
        try:
            self._watch([*start, *watch])
        except Stopped:
            ids = sorted({_recorded(folder)[0].partition("_")[0] for folder in (*start, *watch)} - {""})
            cure = f"`scancel {' '.join(ids)}` ends them, the same command again watches them"
            print(f"\nthe jobs stay in the queue: {cure}", file=sys.stderr)
            raise

    @staticmethod
    def states(folders: Iterable[Path]) -> dict[Path, str]:
        """What Slurm, asked once, knows of the runs that were given to it: see `boltlab.runs.job_states`."""
        return {folder: word for folder, (word, _) in _ask(folders).items()}

    def _submit(self, top: Path, folders: list[Path], entry: str) -> None:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitit.AutoExecutor(top / "slurm", cluster="slurm")
        executor.update_parameters(name=top.name, **self.parameters)
        again = ["requeue"] if self.requeue else []
        commands = [[sys.executable, "-m", __name__, entry, str(folder), *again] for folder in folders]
        try:
            jobs = executor.map_array(os.execv, [sys.executable] * len(folders), commands)
        except (FailedJobError, FailedSubmissionError) as e:
            said = [line.removeprefix("sbatch: error: ").strip() for line in str(e).splitlines() if line.strip()]
            raise UserError(
                f"launcher=slurm: sbatch refused, nothing was submitted: {'; '.join(said[:3])}."
                " launcher.partition=…, launcher.timeout_min=… and the other keys of launcher say what is asked for"
            ) from None
        for folder, job in zip(folders, jobs, strict=True):
            # In a file of its own: the job may be writing its summary already.
            runs.write_json(folder / "job.json", {"slurm": job.job_id, "name": top.name})
        print(f"submitted as Slurm job {jobs[0].job_id.partition('_')[0]}, {len(jobs)} in all", flush=True)

    def _watch(self, folders: list[Path]) -> None:
        before: dict[Path, tuple[str, str]] = {}
        while True:
            known = _ask(folders)
            for folder in folders:
                word, why = known.get(folder, (None, ""))
                now = runs.status(runs.read_summary(folder), folder, word), why
                if now != before.get(folder):
                    before[folder] = now
                    more = f" ({why})" if why else f"  {_output(folder)}"
                    print(f"{time.strftime('%H:%M:%S')}  {folder.name}  {now[0]}{more}".rstrip(), flush=True)
            if not any(runs.Status(state).at_work for state, _ in before.values()):
                break
            time.sleep(self.poll_seconds)
        for folder in folders:
            _explain(folder, before[folder][0])


def _ask(folders: Iterable[Path]) -> dict[Path, tuple[str, str]]:
    """The state of each run that was given to Slurm, and why it waits, in Slurm's word."""
    given = {folder: job for folder in folders if (job := _recorded(folder))[0]}
    if not given:
        return {}
    wanted = "JobArrayID:64,State:32,RestartCnt:16,Reason:48,Name:256"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={wanted}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(given, ("unknown", ""))
    found = {}
    for line in done.stdout.splitlines():
        places = ((0, 64), (64, 96), (96, 112), (112, 160), (160, None))
        number, state, restarts, reason, name = (line[begin:end].strip() for begin, end in places)
        word = _word(state, restarts)
        found[number, name] = (word, reason if word in ("queued", "preempted") and reason != "None" else "")
    for folder, job in given.items():  # a cluster may hide the jobs of others
        found.setdefault(job, ("gone" if folder.stat().st_uid == os.getuid() else "unknown", ""))
    return {folder: found[job] for folder, job in given.items()}


def _word(state: str, restarts: str) -> str:
    if state in _WAITING:
        return "queued" if restarts == "0" else "preempted"
    return "running" if state in _RUNNING else "cancelled" if state == "CANCELLED" else "gone"


def _recorded(folder: Path) -> tuple[str, str]:
    """Number and name of the job that a run was given to; empty where there is none."""
    job = runs.read_json(folder / "job.json")
    return str(job.get("slurm", "")), str(job.get("name", ""))


def _output(folder: Path) -> str:
    """Where to look for more, once a run has begun."""
    output = folder / process.OUTPUT
    return str(runs.shown(output)) if output.exists() else ""


def _explain(folder: Path, state: str) -> None:
    """Writes into the summary of a run why its job ended, where it could not do so itself."""
    if state not in ("killed", "cancelled", "not started"):
        return
    number, _ = _recorded(folder)
    logs = [path for parent in (folder, folder.parent) for path in (parent / "slurm").glob(f"{number}_*_log.err")]
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = said[-1].strip() if said else f"job {number} ended without a word"
    if state == "not started":  # an array's jobs that are cancelled in the queue leave no trace
        state = "failed" if logs else "cancelled"
    if state == "cancelled":
        reason = f"job {number} was cancelled"
    with suppress(UserError), runs.lock(folder):  # another process is at it again
        runs.write_summary(folder, status=state, reason=reason)


def main(entry: str, folder: Path, requeue: bool) -> int:
    """A task of a job. Slurm's warning before the time limit comes as SIGUSR1: saved, then queued again."""
    signals.only_caught()  # else what ends the job's other tasks would end this one before it is queued again
    code = process.main(entry, folder)
    warned = code == 128 + signal.SIGUSR1
    if warned and requeue and int(os.environ.get("SLURM_PROCID", 0)) == 0:
        # Of an array's job, SLURM_JOB_ID may be the number of the whole array.
        done = subprocess.run(["scontrol", "requeue", str(started_by.slurm_job())], check=False)
        print("queued again, to go on" if done.returncode == 0 else "scontrol requeue failed", flush=True)
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1], Path(sys.argv[2]), "requeue" in sys.argv[3:]))
