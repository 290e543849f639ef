"""Metrics of an epoch, beside those of torchmetrics."""

from boltlab.ground.lazy import public

__all__, __getattr__ = public(__name__, __file__)
