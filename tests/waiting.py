"""Waiting in tests: for what happens, and never for a time, which a busy machine may need ten times over."""

import time

HANG = 600.0  # seconds: what has not happened by then never will


def until(met, process=None, seconds=HANG):
    """Returns what `met` returns once that is true; fails where `process`, if given, ends before."""
    end = time.monotonic() + seconds
    while not (found := met()):
        assert process is None or process.poll() is None, f"it has ended with {process.returncode}"
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)
    return found
