import csv
import tempfile

import pytest
import torch
import yaml

from boltlab import runs
from boltlab.commands import grid
from boltlab.config.compose import compose
from boltlab.training import probe
from boltlab.training import search as tune

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("model=linear", "logger=csv", "trainer.accelerator=cpu", "trainer.max_epochs=2", "test=false")


def metrics(folder):
    """Every logged value but the times."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("samples_per_second", "data_wait_share")} for row in rows]


def test_the_run_equals_one_that_was_given_the_numbers(boltlab, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "SECONDS_PER_SIZE", 0.01)
    monkeypatch.setattr(probe, "tempfile", Here(tmp_path))
    code, out, err = boltlab("train", *QUICK, "optimizer.lr=auto", "data.batch_size=auto")
    assert code == 0, err
    (searched,) = runs.folders("logs")
    found = runs.read_summary(searched)["found"]
    assert set(found) == {"optimizer.lr", "data.batch_size"}
    assert f"optimizer.lr={found['optimizer.lr']}  found in" in out
    config = yaml.safe_load((searched / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == config["model"]["optimizer"]["lr"] == found["optimizer.lr"]
    assert config["data"]["batch_size"] == found["data.batch_size"]
    assert boltlab("train", *QUICK, *(f"{key}={value}" for key, value in found.items()))[0] == 0
    given = next(runs.folders("logs"))
    assert given != searched and metrics(given) == metrics(searched)
    # Nothing is left of the search.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]
    assert len(list(runs.folders("logs"))) == 2


class Here:
    """Puts temporary folders where the test sees what is left of them."""

    def __init__(self, folder):
        self.folder = folder

    def TemporaryDirectory(self):
        return tempfile.TemporaryDirectory(dir=self.folder)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_is_one_that_learns(optimizer, boltlab):
    code, _, err = boltlab("train", *QUICK, f"optimizer={optimizer}", "optimizer.lr=auto", "scheduler=constant")
    assert code == 0, err
    (folder,) = runs.folders("logs")
    assert runs.read_summary(folder)["best"]["val_acc"] > 0.8


def test_a_loss_that_never_falls_gives_no_learning_rate(boltlab, monkeypatch):
    from project.models.classifier import Classifier

    monkeypatch.setattr(Classifier, "criterion", lambda self, output, target: (output.sum() * 0 + 2, len(target)))
    code, _, err = boltlab("train", *QUICK, "optimizer.lr=auto")
    assert code == 1 and "the loss did not fall" in err and "give a number" in err
    (folder,) = runs.folders("logs")
    assert runs.read_summary(folder)["status"] == "failed"


def test_smoothing_leaves_a_minimum_where_it_is():
    losses = [float((i - 30) ** 2) for i in range(60)]
    smooth = tune.smoothed(losses)
    assert smooth.index(min(smooth)) == 30 and len(smooth) == 60
    assert tune.smoothed([3.0]) == [3.0] and tune.smoothed([]) == []


def found_batch_size(monkeypatch, seconds, needed=lambda size: size, free=None, fits=None):
    """The batch size, and why, on a machine with these times of a step and bytes for each size."""

    def try_size(step, batch, size):
        if fits is not None and size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return seconds(size), needed(size)

    monkeypatch.setattr(tune, "_try_size", try_size)
    monkeypatch.setattr(probe, "free_memory", lambda device: free)
    config = compose("train", ["model=linear", "data.batch_size=auto", "trainer.accelerator=cpu"]).config
    return tune.batch_size(config)


def test_the_batch_grows_while_that_makes_training_faster(monkeypatch):
    # Fixed cost of 64 samples: 512 makes 8/9 of all that can be had, 1024 is not tried in vain.
    size, _ = found_batch_size(monkeypatch, lambda size: 64 + size)
    assert size == 512
    size, why = found_batch_size(monkeypatch, lambda size: size)
    assert size == tune.SMALLEST_BATCH and "hardly faster" in why


def test_no_batch_is_larger_than_the_training_split(monkeypatch):
    size, why = found_batch_size(monkeypatch, lambda size: 1.0)
    assert size == 1024 and "the training split has 1294 samples" in why


def test_memory_ends_the_search(monkeypatch):
    size, why = found_batch_size(monkeypatch, lambda size: 1.0, fits=200)
    assert size == 128 and "256 does not fit" in why
    # On the CPU, before it is tried: twice the bytes of 128 are more than half of what is free.
    size, why = found_batch_size(monkeypatch, lambda size: 1.0, free=500)
    assert size == 64 * 2 and "256 may take more than 50%" in why


def test_nothing_that_fits_is_a_clear_error(monkeypatch):
    from boltlab.ground.errors import UserError

    with pytest.raises(UserError, match="16 does not fit into memory; give a number"):
        found_batch_size(monkeypatch, lambda size: 1.0, fits=8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.lr=auto", "trainer.devices=2"), "is searched by one process"),
        (("data.batch_size=auto", "trainer.devices=2"), "is searched by one process"),
        (("optimizer.weight_decay=auto",), "AdamW takes float"),
        (("optimizer.lr=Auto",), "AdamW takes float"),
        (("data.val_fraction=auto",), "takes float, int"),
    ],
)
def test_auto_is_for_two_keys_and_one_process(overrides, message, boltlab):
    code, _, err = boltlab("train", *QUICK, *overrides)
    assert code == 2 and message in err


def test_each_job_of_a_grid_searches(monkeypatch, boltlab):
    answers = iter([0.01, 0.02])
    monkeypatch.setattr(tune, "lr", lambda config: (next(answers), "so it is"))
    assert grid.main([*QUICK, "optimizer.lr=auto", "seed=1,2"]) == 0
    assert sorted(runs.load_config(folder).optimizer.lr for folder in runs.folders("logs")) == [0.01, 0.02]


def test_a_run_is_evaluated_with_numbers_only(boltlab):
    assert boltlab("train", *QUICK)[0] == 0
    code, _, err = boltlab("eval", "run=latest", "data.batch_size=auto")
    assert code == 2 and "is searched by boltlab train only" in err
