"""See tests/warm.py."""

from warm import warm, warm_server  # noqa: F401
