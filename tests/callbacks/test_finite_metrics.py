"""A validation or test loss, or the monitored metric, that is no number ends the run; another one is named once."""

import csv
import json
import math

import pytest
import torch
from torchmetrics import SpearmanCorrCoef
from warm import only_run

from boltlab import runs
from project.models.classifier import Classifier

QUICK = (
    *("logger=csv", "trainer.accelerator=cpu", "data.max_samples=200", "data.input_shape=[1,8,8]", "model=mlp"),
    *("~callbacks.summary", "trainer.max_epochs=3"),
)


def broken(value, stage, epoch=1):
    """The classifier's own evaluation, with an output that is `value` for all samples."""
    own = Classifier.forward

    def forward(self, x):
        output = own(self, x)
        now = self.trainer.state.stage.value
        return output * value if now == stage and (stage == "test" or self.current_epoch == epoch) else output

    return forward


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("monitor", ["val_loss", "val_acc"])
def test_a_validation_loss_ends_the_run_before_a_checkpoint_is_chosen(value, monitor, boltlab, monkeypatch):
    monkeypatch.setattr(Classifier, "forward", broken(value, "validate"))
    mode = "min" if monitor == "val_loss" else "max"
    code, _, err = boltlab("train", *QUICK, f"monitor={monitor}", f"mode={mode}")
    assert code == 1 and "val_loss is nan" in err, err
    summary = runs.read_summary(only_run())
    assert summary["status"] == "failed" and summary["error"] == "NonFiniteLoss"
    files = (only_run() / "checkpoints").glob("*.ckpt")
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in files}
    assert steps.keys() >= {"last.ckpt"} and len(set(steps.values())) == 1  # those of the epoch before
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0, err


def test_a_test_loss_ends_the_run_and_an_evaluation(boltlab, monkeypatch):
    monkeypatch.setattr(Classifier, "forward", broken(float("nan"), "test"))
    code, _, err = boltlab("train", *QUICK)
    assert code == 1 and "test_loss is nan" in err
    code, _, err = boltlab("eval", "run=latest")
    assert code == 1 and "test_loss is nan" in err


@pytest.mark.filterwarnings("ignore:.*will save all targets")
def test_another_metric_is_named_once(boltlab, tmp_path, monkeypatch):
    monkeypatch.setattr(SpearmanCorrCoef, "compute", lambda self: torch.tensor(math.nan))
    rows = [["a", "b", "y"], *([i, i % 7, 2 * i + i % 7] for i in range(40))]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    table = ("data=csv", "data.path=t.csv", "data.target=y", "data.task=regression", "data.val_fraction=1")
    chosen = ("monitor=val_loss", "mode=min", "model=linear_regressor", "trainer.max_epochs=3", "logger=csv")
    chosen += ("metrics=spearman",)
    code, out, err = boltlab("train", *table, *chosen, "optimizer.lr=0.1", "trainer.accelerator=cpu")
    assert code == 0, err
    assert out.count("val_spearman is nan") == 1 and json.loads((only_run() / "summary.json").read_text())["test"]
