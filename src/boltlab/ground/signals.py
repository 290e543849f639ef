"""What a process does when it is told to stop: finish the step, save, and end with 128 + the signal's number.

SIGTERM (a cluster takes the machine), SIGINT (Ctrl-C), SIGHUP (the terminal is gone) and SIGUSR1 (a warning before the
time limit, Slurm's `#SBATCH --signal=USR1@120`) stop the run; SIGUSR2 only saves a checkpoint. The same signal
again ends the process at once.
"""

import ctypes
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
SAVING = getattr(signal, "SIGUSR2", None)
ALL = (*STOPPING, *([SAVING] if SAVING is not None else []))
_PR_SET_PDEATHSIG = 1
_SAME_SECONDS = 0.5  # a terminal and a launcher, or a scheduler, deliver the same signal twice


class Stopped(BaseException):
    """The run was told to stop and did; no error, so nothing that catches errors may swallow it.

    at_once: where the signal found this process, and not after a step that all processes of the run agreed on.
    """

    def __init__(self, signum: int, at_once: bool = False) -> None:
        self.signum, self.at_once = int(signum), at_once
        super().__init__(f"stopped by {name(signum)}")


def name(signum: int) -> str:
    """SIGTERM for 15, and so on."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


@dataclass
class Inbox:
    """The signals of this process that were not acted on yet.

    deferred: somebody looks here at every step; else a signal raises `Stopped` where it finds the process.
    """

    stop: int = 0  # number of the signal that asks the run to stop
    since: float = 0.0  # when that came, of time.monotonic
    save: bool = False  # a checkpoint is asked for
    deferred: bool = False
    raised: bool = False  # `Stopped` was raised where the signal found the process


inbox = Inbox()


@contextmanager
def heard() -> Iterator[None]:
    """Raises `Stopped` again where what runs inside has made something else of it: a `finally` that failed on what was
    half done, an import that turns every error into its own, a callback whose errors are only printed."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as e:
        if inbox.raised:
            raise Stopped(inbox.stop, at_once=True) from e
        raise
    if inbox.raised:
        raise Stopped(inbox.stop, at_once=True)


@contextmanager
def caught(
    at_once: Callable[[int], Any] = lambda signum: None, forward: Callable[[int], Any] | None = None
) -> Iterator[None]:
    """Puts signals into the inbox while what runs inside runs; does nothing outside of the main thread.

    Those that were held back until now (`hold_back`) come at once.

    at_once: called before the process ends because a signal came again.
    forward: passes a signal on to the processes that are the run; this one only waits for them.
    """
    global inbox
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with heard():  # what begins after a stop that was lost does not begin
        pass
    outer, inbox = inbox, Inbox()

    def handle(signum: int, frame: Any) -> None:
        now, box = time.monotonic(), inbox
        if signum == SAVING:
            box.save = True
        elif not box.stop:
            box.stop, box.since = signum, now
            if forward is None and not box.deferred:
                box.raised = True
                raise Stopped(signum, at_once=True)
        elif signum != box.stop or now - box.since < _SAME_SECONDS:
            return  # a warning and then SIGTERM ask for the same
        else:
            at_once(signum)
            os.write(2, f"\x1b[?25h\n{name(signum)} again: ended at once, without a checkpoint\n".encode())
            os._exit(128 + signum)
        if forward is not None:
            forward(signum)

    before = {s: signal.signal(s, handle) for s in ALL}
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)
        with heard():
            yield
    finally:
        for signum, handler in before.items():  # Python takes its own handlers away before a process has ended
            signal.signal(signum, signal.SIG_IGN if handler is _wait else handler)
        inbox = outer


@contextmanager
def passed_on(send: Callable[[int], Any]) -> Iterator[None]:
    """Sends the signals that come while what runs inside runs to the processes that it waits for, SIGKILL where one
    comes again.

    Raises:
        Stopped: at the end, where one told this command to stop.
    """
    with caught(at_once=lambda _: send(9), forward=send):
        yield
        stopped = inbox.stop
    if stopped:
        raise Stopped(stopped)


def hold_back() -> None:
    """Leaves the signals of this process, and of those that are forked from it, for a `caught` to come."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, ALL)


def only_caught() -> None:
    """From here on, signals are heard inside of `caught`: before it they wait, and after it they are ignored, so that
    nothing takes this process's exit code away."""
    hold_back()
    for signum in ALL:
        signal.signal(signum, _wait)  # to ignore it would also forget those that wait


def _wait(signum: int, frame: Any) -> None:
    """Stands for what `caught` is to do."""


def stop_with_parent() -> None:
    """As `preexec_fn` of a subprocess (Linux): when the thread that starts it dies, however, SIGTERM comes to it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def die_with_parent() -> None:
    """This process is killed when the one that has asked for it dies, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True).start()
