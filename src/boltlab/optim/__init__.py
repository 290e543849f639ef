"""Optimizers and schedules beside those of torch, and what builds them for a net."""

from boltlab.ground.lazy import public

__all__, __getattr__ = public(__name__, __file__)
