"""Errors that are the user's to mend: printed as they stand, without a traceback."""

import difflib
from dataclasses import dataclass


class UserError(Exception):
    """Something outside the code is wrong; the message says what and how to mend it. The command exits with 1."""


class DataError(UserError):
    """A data set is missing, unreadable or not what the config says; the message names the file, folder or class."""


class NonFiniteLoss(UserError):
    """A loss, a gradient, the weights or the monitored metric became NaN or infinite; the message says which, where."""


class WorkerError(UserError):
    """A process that reads data has died, hangs, or cannot send its batches; started again it may well go on."""


@dataclass(frozen=True)
class Mistake:
    """One mistake: the key path (with the value that was given), what is wrong and how to mend it."""

    where: str
    message: str


class ConfigError(UserError):
    """All mistakes of a config at once; the command exits with 2."""

    def __init__(self, mistakes: list[Mistake]):
        self.mistakes = list(dict.fromkeys(mistakes))
        super().__init__("\n".join(f"  {m.where}\n      {m.message}" for m in self.mistakes))


def suggest(problem: str, word: str, names: list[str], otherwise: str) -> str:
    """The problem, the nearest of the names where one is near, and what else helps."""
    swapped = [name for name in names if sorted(name) == sorted(word)]  # two letters changed places
    near = swapped or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"{problem}: did you mean {near[0]!r}? {otherwise}" if near else f"{problem}; {otherwise}"
