"""Data modules to derive from or to name in a config, and the fast path from memory and files to batches."""

from boltlab.ground.lazy import public

__all__, __getattr__ = public(__name__, __file__)
