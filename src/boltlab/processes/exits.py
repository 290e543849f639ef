"""The end of a command as an exit code: 0, 1 (failed), 2 (a mistake in the command or a config), 128 + a signal."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from boltlab.ground import started_by
from boltlab.ground.errors import ConfigError, UserError
from boltlab.ground.signals import Stopped


def leave(code: int) -> NoReturn:
    """Ends the process: waits for its threads, calls what is to be called at exit, writes what is left to be written.

    What else Python does at the end, which is to take every object apart, takes some 2 s once torch is imported.
    """
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # None, or nobody reads it any more, or closed
            stream.flush()
    os._exit(code)


def led(command: Callable[[], int]) -> int:
    """Runs a command; of the processes that torchrun or srun has started, in rank 0 only, which the others follow."""
    try:
        world = started_by.outside()
    except ConfigError:
        raise
    except UserError as e:
        print(f"boltlab: {e}", file=sys.stderr)
        return 1
    if world is None:
        return command()
    from boltlab.processes import rendezvous

    return rendezvous.run(world, command)


def exit_code(verb: str, command: Callable[[], int]) -> int:
    """What a command returns; what it raises as a message and the code that belongs to it."""
    from boltlab.config.validate import report

    try:
        return command()
    except ConfigError as e:
        report(verb, e)
        return 2
    except Stopped as e:
        print(f"boltlab {verb}: {e}", file=sys.stderr)
        return 128 + e.signum
    except KeyboardInterrupt:
        print(f"boltlab {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        from boltlab.processes.explained import explained

        said = explained(e)
        if said is None or os.environ.get("BOLTLAB_TRACEBACK"):
            raise
        from boltlab.ground.texts import plain

        print(f"boltlab {verb}: {plain(said)}", file=sys.stderr)
        return 1
