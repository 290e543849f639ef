"""Callbacks for any LightningModule; configs/callbacks names each."""

from boltlab.ground.lazy import public

__all__, __getattr__ = public(__name__, __file__)
