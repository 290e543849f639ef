"""Every mistake of a composed config, before anything is built."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from boltlab.config import auto as machine
from boltlab.config.build import build
from boltlab.config.check import SEARCHED, Checker
from boltlab.config.roots import ROOTS
from boltlab.ground import credentials
from boltlab.ground.errors import ConfigError, Mistake


@contextmanager
def imports() -> Iterator[None]:
    """Around the place where torch and the rest are imported: they leave a million objects for good. Each full garbage
    collection would walk through them, all through the training, and in a forked process that copies all of them."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else nanobind, which comes with triton, reports all of its functions as leaked


@imports()
def problems(verb: str, config: DictConfig, settled: bool = False, texts: set[str] | None = None) -> list[Mistake]:
    """Every mistake in a composed config; fills in, in place, what stands at "auto".

    settled: see `edit`. texts: gets the keys that hold a number and take a text: see `Checker`.
    """
    if "augment" in config and "augment" not in (config.get("data") or {}):
        config.augment = None  # a table has none; its preset would ask the data for an image's shape
    checker = Checker(config, SEARCHED if verb == "train" else (), texts)
    checker.roots(ROOTS[verb])
    secrets = [Mistake(where, message) for where, message in credentials.mistakes(config)]
    if secrets:  # alone: other messages show the values
        return secrets
    if verb == "eval":  # its callbacks refer to the config of the run: they are checked when they are laid over it
        return checker.found
    open_keys = machine.placeholders(config)
    checker.groups()
    if config.get("data") is not None and not checker.found:
        checker.discover()
    checker.walk(config, "")
    if not checker.found:
        machine.resolve(config, open_keys, build)
        checker.together(open_mode="mode" in open_keys, modes=not settled)
    return checker.found


def report(verb: str, error: ConfigError) -> None:
    """Prints all mistakes to stderr, in at most a screenful."""
    from boltlab.ground.texts import plain

    count = len(error.mistakes)
    lines = plain(credentials.masked(str(error))).split("\n")
    print(f"boltlab {verb}: {count} mistake{'s' * (count > 1)} in the config, nothing was started\n", file=sys.stderr)
    print("\n".join(line if len(line) <= 400 else line[:399] + "…" for line in lines[:40]), file=sys.stderr)
    if len(lines) > 40:
        print(f"  … and {(len(lines) - 40) // 2} more", file=sys.stderr)
