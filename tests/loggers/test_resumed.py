"""A part of a run that goes on, with each tracker: what the part before it lost is filled in, what is done again is not
there twice."""

import time
from pathlib import Path

import pytest
from trackers import READERS, comparable, of_csv

from boltlab.loggers.csv import CSVLogger

pytestmark = pytest.mark.services

PLACE = "logs/train/a"
TRACKERS = {
    "mlflow": ("MLFlowLogger", {"finish_timeout_seconds": 600}),
    "tensorboard": ("TensorBoardLogger", {}),
    "wandb": ("WandbLogger", {"mode": "offline"}),
}


@pytest.fixture(autouse=True)
def service():  # W&B's writes into the folder of the test that has started it
    yield
    pytest.importorskip("wandb").teardown()


def tracker(name):
    pytest.importorskip(name)
    kind, options = TRACKERS[name]
    if name == "mlflow":  # which remembers where a relative address led before
        options = {**options, "tracking_uri": f"sqlite:///{Path.cwd()}/logs/mlflow.db"}
    return getattr(pytest.importorskip(f"boltlab.loggers.{name}"), kind)(dir=PLACE, **options)


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("first", [3, 6], ids=["steps are done again", "none is"])
def test_each_value_once(tmp_path, name, first):
    """Of step 3, the part that goes on logs only what its checkpoint came before."""
    lost = {"mlflow": {1, 4}, "wandb": {1, 4}}.get(name, set())  # TensorBoard's file is complete after each call
    for steps in (range(6), range(first, 9)):
        loggers = [CSVLogger(PLACE), tracker(name)]
        loggers[1].log_hyperparams({"seed": 0})
        for step in steps:
            for logger in loggers[: 1 if steps == range(6) and step in lost else 2]:
                if step != first:
                    logger.log_metrics({"epoch": 0, "loss": 1 / (step + 1)}, step)
                if step in (3, first):
                    logger.log_metrics({"epoch": 0, "val_loss": 0.5}, step)
        loggers[1].finalize("failed")
        time.sleep(1.1 * (name == "wandb"))  # which names the files of a part by the second
    expected = comparable(of_csv(tmp_path / PLACE))
    assert set(expected.values()) == {1} and len(expected) == 8 + (2 if first == 6 else 1)
    assert comparable(READERS[name](tmp_path / PLACE)) == expected
