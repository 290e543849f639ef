"""Where stdout and stderr can take no more: the reader of a pipe has left, the disk is full, nothing was opened."""

import errno
import io
import os
import sys
from typing import Any


class _Kept(io.FileIO):
    """A file descriptor whose first failure is said, and from which on all goes nowhere: nobody writes to the screen to
    find out whether it is there."""

    def __init__(self, number: int, says_all: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.says_all = says_all

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as e:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what is started from here, too
            os.close(nowhere)
            if self.fileno() == 1 and (self.says_all or e.errno != errno.EPIPE):
                print(
                    f"boltlab: stdout takes no more ({e.strerror}); it continues without", file=sys.stderr, flush=True
                )
            return memoryview(content).nbytes


def keep_going(says_all: bool) -> None:
    """Has this process, and those that are forked from it, continue where nobody takes what they print.

    says_all: that a pipe has no reader is said too; for what prints and ends, that is how it is used.
    """
    if hasattr(os, "dup2"):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # what was closed is nothing else's from here on
            os.set_inheritable(number, True)
        os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 (for good)
        elif type(stream) is io.TextIOWrapper:
            file = io.BufferedWriter(_Kept(number, says_all))
            by_line = stream.line_buffering or number == 2
            errors = "surrogateescape" if stream.errors == "strict" else stream.errors  # a file's name may be no text
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, errors, line_buffering=by_line))
