"""Processes that torchrun or srun has started: rank 0 runs the command, the others follow it.

Only rank 0 reads the command line, composes, checks and makes the run folder. It tells the others, through the store in
which torch processes find one another, what to run and in which folder; then all of them run the same.
"""

import importlib
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from boltlab.ground import signals
from boltlab.ground.errors import UserError
from boltlab.ground.started_by import World, outside

_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 300.0  # that the processes may be apart at their start
_SHUTDOWN_SECONDS = 10.0  # that a process has when rank 0 is gone
_END_SECONDS = 10.0  # that rank 0, which holds the store, waits for the others to have read its last word
_groups = itertools.count()
_met: Any = None  # the part of the store that belongs to this start of the processes
_leading: "_Leader | None" = None


def run(command: Callable[[], int]) -> int:
    """Runs a command in rank 0 of the processes from outside, and what it tells them in the others; its exit code."""
    try:
        world = outside()
    except UserError as e:
        print(f"boltlab: {e}", file=sys.stderr)
        return 1
    if world is None:
        return command()
    if "RANK" not in os.environ:
        _as_torchrun(world)
    # The first to end has the launcher tell the others to stop, who would lose their exit codes after `caught`.
    signals.only_caught()
    try:
        with signals.caught():
            return _follow(world, _store()) if world.rank else _lead(world, _store(), command)
    except signals.Stopped as e:
        return 128 + e.signum
    except UserError as e:
        print(f"boltlab, rank {world.rank}: {e}", file=sys.stderr)
        return 1


def leading() -> "_Leader | None":
    """The rank 0 that this process is, if processes from outside follow it."""
    return _leading


@contextmanager
def joined(on_gpu: bool, backend: str | None, timeout: timedelta) -> Iterator[None]:
    """Inside, the processes from outside are torch's process group. backend: None takes that of the device.

    Left to itself, torch would have the processes find one another in the whole store: where torchrun has started them
    again, under the addresses of those that are gone.
    """
    import torch
    from torch.distributed import PrefixStore

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
    torch.distributed.barrier()  # rank 0 goes on with what all of them have written
    torch.distributed.destroy_process_group()  # after an error, the end of the process does it


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


class _Leader:
    """Rank 0: tells the others what to run.

    begun: the folder of the run that these processes were at when torchrun started them again.
    """

    def __init__(self, world: World, store: Any, part: Any) -> None:
        self.world, self.store, self.part, self.orders = world, store, part, 0
        self.alone = False  # one of the others has failed: there is no going on
        self.begun = Path(store.get("boltlab/run").decode()) if store.check(["boltlab/run"]) else None

    def begin(self, folder: Path) -> None:
        """Has the next start of these processes know the run."""
        self.store.set("boltlab/run", str(folder))

    def order(self, follow: Callable[..., Any], entry: Callable[[str], Any], folder: Path) -> None:
        """Has the others call `follow(entry, folder)`; returns when all of them see the folder.

        Raises:
            UserError: one of them cannot, or gives no answer.
        """
        if self.alone:
            raise UserError(f"a process that {self.world.launcher} has started is gone: start the command again")
        number, self.orders = self.orders, self.orders + 1
        message = {"follow": function_name(follow), "entry": function_name(entry), "folder": str(folder)}
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
    global _leading, _met
    _met = _meet(world, store)
    _leading = _Leader(world, store, _met)
    code = 1
    try:
        code = command()
    finally:
        _leading.end(code)
        _leading = None
    return code


def _follow(world: World, store: Any) -> int:
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
                    named(message["follow"])(named(message["entry"]), folder)
            except signals.Stopped:  # as all of them: the next word of rank 0 is its exit code
                signals.inbox.deferred = True
    finally:
        ended.set()
        with suppress(Exception):
            part.add("left", 1)
    raise AssertionError("it counts without end")


def _end_with_rank_0(part: Any, ended: threading.Event) -> None:
    """Ends this process, also one that hangs, when the store is gone: srun leaves it alone with its node."""
    with suppress(Exception):
        while not ended.wait(1.0):
            part.check(["left"])
        return
    if not ended.wait(_SHUTDOWN_SECONDS):
        os._exit(1)


def function_name(function: Callable[..., Any]) -> str:
    """module:function, of one that stands at the top of a module."""
    return f"{function.__module__}:{function.__qualname__}"


def named(name: str) -> Any:
    """The function that module:function names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


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
