"""A Slurm cluster of one node, this machine, for the tests: Debian's slurm-wlm and munge, as root.

Everything stands in one folder, every daemon listens on loopback, and nothing of the system's own Slurm is touched.
"""

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from waiting import HANG

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

# `high` preempts `low`. What is scheduled, killed and told is looked at often, so that the tests are quick; a machine's
# memory and cores are given away several times over, because each job of the tests is a small one.
CONF = """
ClusterName=boltlab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=300
KillWait=600
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0,defer_batch
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=high Nodes={host} MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing():
    """Why no cluster can be started here, or nothing."""
    if not sys.platform.startswith("linux"):
        return "Slurm runs on Linux"
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a cluster of one's own is started by root"


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """Started by `with`; `environment` is what a command needs to find it."""

    def __init__(self, folder, cpus=4):
        self.folder, self.cpus = Path(folder), cpus
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self.daemons = []

    def __enter__(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        host = platform.node().split(".")[0]
        ports = {"controller_port": _free_port(), "node_port": _free_port()}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        self.conf.write_text(CONF.format(folder=self.folder, host=host, cpus=self.cpus, memory=memory, **ports))
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "log", "pid", "seed")}
        options = [f"--{name}-file={files[name]}" for name in ("log", "pid", "seed")]
        self.start("munged", "-F", "--force", f"--key-file={key}", f"--socket={files['socket']}", *options)
        self.wait_for("munge.socket", files["socket"].exists)
        self.start("slurmctld", "-D", "-c")
        self.start("slurmd", "-D", "-c")
        self.wait_for("an idle node", lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False))
        return self

    def __exit__(self, *_):
        with suppress(AssertionError):
            self.run("scancel", "--user=root", check=False)
            self.wait_for("the end of all jobs", lambda: not self.run("squeue", "-h", check=False), 10)
        for process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return False

    def start(self, program, *arguments):
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        with open(self.folder / f"{program}.out", "wb") as out:
            kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "COV"))}
            self.daemons.append(
                subprocess.Popen(
                    [path, *arguments],
                    env={**kept, **self.environment},
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def run(self, *command, check=True):
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False, timeout=HANG
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def wait_for(self, what, met, seconds=HANG):
        end = time.monotonic() + seconds
        while not met():
            for process in self.daemons:
                assert process.poll() is None, f"{process.args} ended with {process.returncode}: {self.logs()}"
            assert time.monotonic() < end, f"no {what} within {seconds} s: {self.logs()}"
            time.sleep(0.05)

    def logs(self):
        files = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in files)
