"""Processes that torchrun or srun has started: rank 0 runs the command, the others follow it.

Only rank 0 reads the command line, composes, checks and makes the run folder. It tells the others, through the store in
which torch processes find one another, what to run and in which folder; then all of them run the same.
"""

import itertools
import json
import os
import pkgutil
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab import runs
from boltlab.config.build import build
from boltlab.ground import signals, started_by
from boltlab.ground.errors import UserError
from boltlab.ground.malloc import keep_freed_memory
from boltlab.ground.started_by import World
from boltlab.processes import ends
from boltlab.processes.launch import Entry

_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 300.0  # that the processes may be apart at their start
_SHUTDOWN_SECONDS = 10.0  # that a process has when rank 0 is gone
_END_SECONDS = 10.0  # that rank 0, which holds the store, waits for the others to have read its last word
_groups = itertools.count()
_met: Any = None  # the part of the store that belongs to this start of the processes


def run(world: World, command: Callable[[], int]) -> int:
    """Runs a command in rank 0 of the processes from outside, and what it tells them in the others; its exit code."""
    if "RANK" not in os.environ:
        _as_torchrun(world)
    # The first to end has the launcher tell the others to stop, who would lose their exit codes after `caught`.
    signals.only_caught()
    try:
        with signals.caught():
            return _obey(world, _store()) if world.rank else _lead(world, _store(), command)
    except signals.Stopped as e:
        return 128 + e.signum
    except UserError as e:
        print(f"boltlab, rank {world.rank}: {e}", file=sys.stderr)
        return 1


@contextmanager
def _joined(config: DictConfig) -> Iterator[None]:
    """Inside, the processes from outside are torch's process group.

    Left to itself, torch would have the processes find one another in the whole store: where torchrun has started them
    again, under the addresses of those that are gone.
    """
    import torch
    from torch.distributed import PrefixStore

    on_gpu, backend, timeout = _group(config)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if torch.cuda.device_count() > 1 else 0)
    torch.distributed.init_process_group(
        backend or ("nccl" if on_gpu else "gloo"),
        store=PrefixStore(f"group-{next(_groups)}", _met),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )
    yield
    torch.distributed.barrier()  # rank 0 continues with what all of them have written
    torch.distributed.destroy_process_group()  # after an error, the end of the process does it


def _group(config: DictConfig) -> tuple[bool, str | None, timedelta]:
    """Of a run's process group: whether it is on GPUs, the backend that the strategy names, the timeout."""
    import torch

    on_gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    strategy = config.trainer.get("strategy")
    timeout = timedelta(seconds=config.get("timeout_seconds", 300.0))
    if not isinstance(strategy, DictConfig):
        return on_gpu, None, timeout
    if strategy.get("timeout"):
        timeout = build(config, "trainer.strategy.timeout")
    return on_gpu, strategy.get("process_group_backend"), timeout


def _as_torchrun(world: World) -> None:
    """Sets the variables of torchrun from those of Slurm."""
    v = os.environ
    job, step = int(v["SLURM_JOB_ID"]), int(v["SLURM_STEP_ID"])
    if world.nodes == 1:
        v.setdefault("MASTER_ADDR", "127.0.0.1")
    else:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        v.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(v["SLURM_STEP_NODELIST"]))
    v.setdefault("MASTER_PORT", str(20000 + (7 * job + step) % 12000))  # below what the system gives away by itself
    v.update(RANK=v["SLURM_PROCID"], LOCAL_RANK=v["SLURM_LOCALID"], GROUP_RANK=v["SLURM_NODEID"])
    v.update(WORLD_SIZE=str(world.size), LOCAL_WORLD_SIZE=str(world.local_size))


def _store() -> Any:
    from torch.distributed import DistError, rendezvous

    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=_CONNECT_SECONDS)))[0]
    except DistError as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes cannot find one another at {where}: {str(e).splitlines()[0]}") from e


def _meet(world: World, store: Any) -> Any:
    """The part of the store in which the processes of this start speak to one another.

    The store of torchrun stays when its processes are started again, with all that was said in it. So rank 0 opens a
    part with a new name, and greets each of the others by a word that no earlier one can have said.
    """
    from torch.distributed import PrefixStore

    if world.rank == 0:
        name = secrets.token_hex(8)
        part = PrefixStore(name, store)
        store.set("boltlab/part", name)
        for rank in range(1, world.size):
            part.set(_wait(part, f"here-{rank}", f"rank {rank}", _CONNECT_SECONDS), "welcome")
        return part
    word, end = secrets.token_hex(8), time.monotonic() + _CONNECT_SECONDS
    part = PrefixStore("none yet", store)
    while not part.check([word]):
        if time.monotonic() > end:
            raise UserError(f"rank 0 gave no answer within {_CONNECT_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
        if store.check(["boltlab/part"]):
            part = PrefixStore(store.get("boltlab/part").decode(), store)
            part.set(f"here-{world.rank}", word)
    return part


class Leader:
    """Rank 0: tells the others what to run.

    begun: the folder of the run that these processes were at when torchrun started them again.
    """

    def __init__(self, world: World, store: Any, part: Any) -> None:
        self.world, self.store, self.part, self.orders = world, store, part, 0
        self.alone = False  # one of the others has failed: nothing can continue
        self.begun = Path(store.get("boltlab/run").decode()) if store.check(["boltlab/run"]) else None

    def begin(self, folder: Path) -> None:
        """Has the next start of these processes know the run."""
        self.store.set("boltlab/run", str(folder))

    def run(self, entry: Entry, folder: Path, config: DictConfig) -> None:
        """Runs `entry(folder, config)` here, and in the others.

        Where another process fails, its launcher sends this one a signal to stop; the failure is what is told.
        """
        ends.clear(folder)
        self.order(entry, folder)
        try:
            with ends.last_word(folder), _joined(config):
                entry(str(folder), config)
        except BaseException as e:
            self.alone = True
            signals.inbox.deferred = True  # the launcher's signal must not hide the cause
            lost = ends.lost_partner(e)
            told = ends.wait_for_reports(folder) if lost or isinstance(e, signals.Stopped) else []
            known = any(not record["partner"] for record in told)
            if lost and not known and (stopped := ends.stopped_by(folder)):  # it was told a little earlier
                raise signals.Stopped(stopped) from None
            if lost or known:
                raise ends.cause(told, {}, self.world.size) from None
            raise

    def order(self, entry: Callable[..., Any], folder: Path) -> None:
        """Has the others call `follow` with these; returns when all of them see the folder.

        Raises:
            UserError: one of them cannot, or gives no answer.
        """
        if self.alone:
            raise UserError(f"a process that {self.world.launcher} has started is gone: start the command again")
        number, self.orders = self.orders, self.orders + 1
        message = {"entry": f"{entry.__module__}:{entry.__qualname__}", "folder": str(folder)}
        self.part.set(f"order-{number}", json.dumps(message))
        for rank in range(1, self.world.size):
            answer = _wait(self.part, f"order-{number}-{rank}", f"rank {rank}", _CONNECT_SECONDS)
            if answer:
                raise UserError(f"rank {rank} {answer}")

    def end(self, code: int) -> None:
        """Has the others end with this exit code; the store, which rank 0 may hold, stays until they know."""
        self.part.set(f"order-{self.orders}", json.dumps({"code": code}))
        end = time.monotonic() + (1.0 if self.alone else _END_SECONDS)
        while self.part.add("left", 0) < self.world.size - 1 and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def _lead(world: World, store: Any, command: Callable[[], int]) -> int:
    global _met
    _met = _meet(world, store)
    leader = started_by.leader = Leader(world, store, _met)
    code = 1
    try:
        code = command()
    finally:
        leader.end(code)
        started_by.leader = None
    return code


def _obey(world: World, store: Any) -> int:
    """Runs what rank 0 tells this process, until its last word: the exit code."""
    global _met
    _met = part = _meet(world, store)
    ended = threading.Event()
    threading.Thread(target=_end_with_rank_0, args=(part, ended), daemon=True).start()
    try:
        for number in itertools.count():
            message = json.loads(_wait(part, f"order-{number}", "rank 0"))
            if "code" in message:
                return int(message["code"])
            folder = Path(message["folder"])
            seen = (folder / "config.yaml").is_file()
            problem = f"on {socket.gethostname()} does not see {folder}: log_dir must lie on a disk that all share"
            part.set(f"order-{number}-{world.rank}", "" if seen else problem)
            try:
                if seen:
                    follow(pkgutil.resolve_name(message["entry"]), folder)
            except signals.Stopped:  # as all of them: the next word of rank 0 is its exit code
                signals.inbox.deferred = True
    finally:
        ended.set()
        with suppress(Exception):
            part.add("left", 1)
    raise AssertionError("it counts without end")


def follow(entry: Entry, folder: Path) -> None:
    """Runs `entry` as one of the processes that rank 0 leads; what it raises is printed before it ends.

    Raises:
        Stopped: all of them were told to stop, and did.
    """
    keep_freed_memory()
    try:
        config = runs.load_config(folder, own=True)
        with ends.last_word(folder), _joined(config):
            entry(str(folder), config)
    except signals.Stopped:
        raise
    except BaseException as e:
        signals.inbox.deferred = True
        if ends.lost_partner(e):
            cause = ends.cause(ends.wait_for_reports(folder), {}, int(os.environ["WORLD_SIZE"]))
            print(f"rank {os.environ['RANK']} ends: {cause}", file=sys.stderr, flush=True)
        elif not isinstance(e, UserError):  # which rank 0 prints
            traceback.print_exc()
        raise SystemExit(1) from None


def _end_with_rank_0(part: Any, ended: threading.Event) -> None:
    """Ends this process, also one that hangs, when the store is gone: srun leaves it alone with its node."""
    with suppress(Exception):
        while not ended.wait(1.0):
            part.check(["left"])
        return
    if not ended.wait(_SHUTDOWN_SECONDS):
        os._exit(1)


def _wait(store: Any, key: str, who: str, seconds: float | None = None) -> str:
    """The value of a key, as soon as there is one; signals are heard meanwhile."""
    from torch.distributed import DistError

    end = time.monotonic() + (seconds or float("inf"))
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise UserError(f"{who} gave no answer within {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)
        return str(store.get(key).decode())
    except DistError as e:
        raise UserError(f"{who} is gone") from e
