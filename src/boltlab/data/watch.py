"""Watches the worker processes of DataLoaders: where one dies, hangs or cannot send its batch, the run ends.

torch notices a worker that has died, but raises the error wherever the training happens to be, in the writing of a
checkpoint too. It waits for ever for a worker that hangs, and for a batch that cannot be sent: the queue only prints
why. While it waits, no step ends, so a signal that is to be acted on after the step has no effect.
"""

import copy
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from boltlab.ground import signals
from boltlab.ground.errors import WorkerError

GRACE_SECONDS = 5.0  # that a batch has to come in after a signal, so that the step can end and be saved
_LOOK_SECONDS = 0.5
_waiting = False  # whether the main thread is waiting for a worker


def watch(loader: Any, seconds: float) -> Any:
    """Has a loader end the run with a `WorkerError` where a worker process dies, cannot send its batch, or hangs.

    seconds: how long a batch may take, but the first one of each iteration; a DataLoader's own `timeout` comes first.

    A DataLoader with workers stays the same object, of a class that is derived from its own; any other loader is
    returned as it is, and one that has `timeout_seconds` is told.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        if not hasattr(loader, "_watched_seconds"):
            loader.__class__ = _watched(type(loader))  # type: ignore[arg-type]
        context = loader.multiprocessing_context or multiprocessing.get_context()
        if "Queue" not in vars(context):
            context = copy.copy(context)
            vars(context)["Queue"] = partial(_Queue, ctx=context)
            loader.multiprocessing_context = context
        vars(loader)["_watched_seconds"] = seconds
    elif hasattr(loader, "timeout_seconds"):
        loader.timeout_seconds = seconds
    return loader


@cache
def _watched(base: Any) -> Any:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    names |= {"__iter__": lambda loader: _batches(loader, partial(base.__iter__, loader)), "_watched_seconds": None}
    return type(base.__name__, (base,), names)


class _Queue(multiprocessing.queues.Queue):
    """What its thread cannot send (shared memory is full, an object cannot be pickled), it answers with the error."""

    def _on_queue_feeder_error(self, e: Exception, obj: Any) -> None:
        if isinstance(obj, tuple) and not isinstance(obj[1], ExceptionWrapper):
            self.put((obj[0], ExceptionWrapper(where="in a DataLoader worker process, sending a batch")))
        else:
            super()._on_queue_feeder_error(e, obj)  # type: ignore[misc]


def _begin(own: Callable[[int], Any] | None, parent: int | None, worker_id: int) -> None:
    """Leaves Ctrl-C and the other signals of the terminal and the cluster to the main process, which ends the workers
    when it has saved. SIGTERM is torch's."""
    for signum in {*signals.ALL} - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if own is not None:
        own(worker_id)
    # torch asks only from here on whether the parent is the same as before: one that is gone already, it would await.
    if parent not in (None, os.getppid()):
        os._exit(1)


def _batches(loader: DataLoader[Any], begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    # A generator: where `iter` itself raises, Lightning ends with an error of its own.
    if getattr(loader.worker_init_fn, "func", None) is not _begin:
        context: Any = loader.multiprocessing_context
        parent = None if context.get_start_method() == "forkserver" else os.getpid()
        loader.worker_init_fn = partial(_begin, loader.worker_init_fn, parent)
    wait, seconds = _Wait(loader), None  # to start the workers, and the first batch, may take long
    try:
        iterator = wait.take(begin, None)
        _raise_only_while_waiting()
        wait.workers = getattr(iterator, "_workers", None) or multiprocessing.active_children()
        while True:
            yield wait.take(partial(next, iterator), seconds)
            seconds = vars(loader)["_watched_seconds"]
    except StopIteration:
        return
    finally:
        wait.over.set()


class _Wait:
    """What a consumer of batches waits for. A thread looks whether that takes too long, and then kills the workers: it
    wakes the consumer wherever it waits, in a worker's socket too.

    It holds neither loader nor iterator: they are to go with the last batch, not when the thread has seen that.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.workers: list[Any] = getattr(getattr(loader, "_iterator", None), "_workers", [])  # persistent ones
        self.over = threading.Event()
        self._timeout = loader.timeout
        self._whose = f"the {loader.num_workers} worker processes of {type(loader.dataset).__name__}"
        self._began: tuple[float, float | None] | None = None  # since when, of time.monotonic, and for how long at most
        self._cause: BaseException | None = None
        self._thread = threading.Thread(target=self._look, name="boltlab-watch", daemon=True)

    def take(self, call: Callable[[], Any], seconds: float | None) -> Any:
        """What `call` returns.

        Raises:
            WorkerError: a worker process has died, hangs, or cannot send.
            Stopped: a signal has come, and after it no batch.
        """
        global _waiting
        if self.workers and self._thread.ident is None:
            self._thread.start()
        self._began, _waiting = (time.monotonic(), self._timeout or seconds), True
        try:
            signal_handling._error_if_any_worker_fails()  # while nobody waited
            return call()
        except StopIteration:
            raise
        except BaseException as e:
            _waiting = False  # first: the signal of what this error came from may still be on its way
            cause = self._cause or self._meant(e)
            if cause is not None or isinstance(e, signals.Stopped):
                self._kill()
            if cause is None:
                raise
            raise cause from e
        finally:
            self._began, _waiting = None, False

    def _look(self) -> None:
        while self._cause is None and not self.over.wait(_LOOK_SECONDS):
            if (began := self._began) is None:
                continue
            now, box = time.monotonic(), signals.inbox
            if box.stop and now - max(began[0], box.since) > GRACE_SECONDS:
                self._cause = signals.Stopped(box.stop)
            elif began[1] and now - began[0] > began[1]:
                self._cause = self._late(began[1])
        if self._cause is not None:
            self._kill()

    def _kill(self) -> None:
        for process in self.workers:
            process.kill()

    def _late(self, seconds: float) -> WorkerError:
        key = "timeout of its DataLoader" if self._timeout else "timeout_seconds"
        return WorkerError(
            f"no batch came from {self._whose} within {seconds:g} s: {_WITHOUT} and shows where it hangs;"
            f" a larger {key} waits longer"
        )

    def _meant(self, error: BaseException) -> BaseException | None:
        """What an error that torch raises means to the user; None where it is the data set's own."""
        text = str(error)
        if "unable to allocate shared memory" in text or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return WorkerError(_full())
        if text.startswith("DataLoader timed out"):
            return self._late(self._timeout)
        lost = isinstance(error, ConnectionError | EOFError) and not text.startswith("Caught ")  # by the data set
        if lost or text.startswith("Pin memory thread exited") or "exited unexpectedly" in text:
            text = self._dead() or text
        if not text.startswith("DataLoader worker (pid"):
            return None
        if signals.inbox.stop:  # a scheduler tells all processes, and workers obey at once
            return signals.Stopped(signals.inbox.stop)
        if "Bus error" in text:
            return WorkerError(_full())
        memory = "if memory was full, take fewer workers or smaller batches"
        return WorkerError(f"{text.strip().rstrip('.')}: {memory}; {_WITHOUT} and shows what else it was")

    def _dead(self) -> str:
        """The workers that are gone, and their exit codes."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self.workers], 1.0)
        for process in self.workers:
            if process.sentinel in ended:
                process.join(1.0)  # its files were closed a moment before it had ended
        dead = [process for process in self.workers if process.exitcode]
        return ", ".join(f"DataLoader worker (pid {p.pid}) ended with exit code {p.exitcode}" for p in dead)


_WITHOUT = "data.num_workers=0 reads without worker processes"


def _full() -> str:
    total = shutil.disk_usage("/dev/shm").total / 2**20 if os.path.isdir("/dev/shm") else 0.0
    return (
        f"shared memory{f' (/dev/shm, {total:,.1f} MB)' if total else ''} is full, through which worker processes send"
        f" their batches: {_WITHOUT}; `docker run --shm-size=1g` or `--ipc=host` gives a container more of it"
    )


def _raise_only_while_waiting() -> None:
    """torch's handler of SIGCHLD raises wherever the main thread is; a worker's death is soon enough known at the next
    batch, where all that belongs to the step is done."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == signal_handling.__name__:
        signal.signal(signal.SIGCHLD, lambda signum, frame: handler(signum, frame) if _waiting else None)
