import pytest

from boltlab.ground.errors import UserError
from boltlab.loggers.tensorboard import TensorBoardLogger

reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="the extra boltlab[tensorboard] is not installed"
)


def test_what_was_logged_can_be_read_back(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"seed": 0, "optimizer": {"lr": 0.1}})
    logger.log_metrics({"val_acc": 0.5}, step=3)
    logger.log_metrics({"val_acc": 0.75}, step=7)
    logger.finalize("success")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_acc")] == [(3, 0.5), (7, 0.75)]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    from lightning.fabric.loggers import tensorboard as lightnings

    monkeypatch.setattr(lightnings, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(lightnings, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(UserError, match=r"pip install 'boltlab\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)
