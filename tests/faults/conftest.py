"""Fixtures of the tests that kill: see tests/warm.py."""

from warm import warm, warm_server  # noqa: F401
