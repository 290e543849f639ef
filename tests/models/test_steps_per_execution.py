"""`steps_per_execution=N` is N=1 to the bit: weights, optimizer, schedules, counters, logged rows."""

import csv
import math

import pytest
import torch
from torch import Tensor

from boltlab import checkpoint, runs
from boltlab.config import build, compose
from boltlab.errors import NonFiniteLoss
from boltlab.trainer import make_trainer, several_steps

pytestmark = pytest.mark.floats

QUICK = ("logger=csv", "test=false", "trainer.accelerator=cpu", "data.batch_size=100", "~callbacks.summary")
# 1,293 training images: 13 batches an epoch, the last of 93.
RECIPES = {
    "default": ["trainer.max_epochs=2"],
    "max_steps in mid-epoch": ["model=mlp", "optimizer=adam", "trainer.max_steps=17", "trainer.max_epochs=9"],
    "norm clipped": [
        *("model=lenet", "optimizer=sgd", "scheduler=cosine", "trainer.max_epochs=2"),
        "trainer.gradient_clip_val=0.5",
    ],
    "values clipped, plateau, dropout, l1": [
        *("model=mlp", "model.net.dropout=0.3", "model.l1=1e-4", "optimizer=sgd", "trainer.max_epochs=2"),
        *("scheduler=plateau", "scheduler.warmup_steps=7"),
        *("trainer.gradient_clip_val=0.01", "trainer.gradient_clip_algorithm=value"),
    ],
    "mixed": ["model=lenet", "model.mixup_alpha=0.4", "model.cutmix_alpha=1.0", "trainer.max_epochs=1"],
    "bf16": ["precision=bf16-mixed", "optimizer=muon", "trainer.log_every_n_steps=3", "trainer.max_epochs=1"],
}


def train(boltlab, *overrides):
    """What a run leaves: its last checkpoint and the rows of its metrics.csv without the times."""
    code, _, err = boltlab("train", *QUICK, *overrides)
    assert code == 0, err
    folder = next(iter(runs.folders("logs")))
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return checkpoint.read(folder / "checkpoints" / "last.ckpt"), rows


TIMES = ("samples_per_second", "data_wait_share")
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def assert_equal(one, other, where=""):
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{place}")
    else:
        assert one == other, where


@pytest.mark.parametrize("recipe", RECIPES)
def test_several_steps_are_single_steps_to_the_bit(boltlab, recipe):
    expected, rows = train(boltlab, *RECIPES[recipe])
    assert any(row["train_loss_step"] and row["lr"] for row in rows)
    for steps in (4, 16):  # 4 leaves a shorter execution at the epoch's end, 16 is longer than the epoch
        found, found_rows = train(boltlab, *RECIPES[recipe], f"steps_per_execution={steps}")
        for part in PARTS:
            assert_equal(expected[part], found[part], part)
        assert found_rows == rows


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # it is the run's own
def test_a_run_is_resumed_with_another_number_of_steps(boltlab):
    whole, _ = train(boltlab, "trainer.max_epochs=2")
    assert boltlab("train", *QUICK, "trainer.max_epochs=2", "callbacks.last.keep_last=2")[0] == 0
    first = next(iter(runs.folders("logs"))) / "checkpoints" / "last-1.ckpt"
    config = compose("train", [*QUICK, "trainer.max_epochs=2", "steps_per_execution=5"]).config
    config.run_dir = str(first.parents[1])
    data, model = build(config, "data"), build(config, "model")
    several_steps(config, data, model)
    trainer = make_trainer(config)
    trainer.fit(model, datamodule=data, ckpt_path=str(first))
    assert trainer.global_step == whole["global_step"] == 26
    assert_equal(whole["state_dict"], dict(model.state_dict()))


@pytest.mark.parametrize("step", [2, 7])
def test_the_guard_names_the_step_inside_of_an_execution(tmp_path, monkeypatch, step):
    config = compose("train", [*QUICK[:-1], "callbacks=[nan_guard]", "steps_per_execution=5"]).config
    config.run_dir = str(tmp_path)
    data, model = build(config, "data"), build(config, "model")
    criterion = model.criterion

    def broken(output, target):
        loss, weight = criterion(output, target)
        return (loss * math.nan if model.global_step == step else loss), weight

    monkeypatch.setattr(model, "criterion", broken)
    several_steps(config, data, model)
    trainer = make_trainer(config)
    with pytest.raises(NonFiniteLoss, match=rf"nan at step {step + 1} \(epoch 0, batch {step},"):
        trainer.fit(model, datamodule=data)


REFUSED = {
    "trainer.devices=2": "runs in one process",
    "precision=16-mixed": "take precision=32 or bf16-mixed",
    "precision=64": "take precision=32 or bf16-mixed",
    "trainer.val_check_interval=0.5": "val_check_interval=null",
    "trainer.val_check_interval=1": "val_check_interval=null",
    "trainer.limit_train_batches=3": "limit_train_batches=null",
    "trainer.overfit_batches=1": "overfit_batches=null",
    "trainer.fast_dev_run=true": "fast_dev_run=null",
    "+callbacks.best.every_n_train_steps=5": "every_n_train_steps=null",
    "+callbacks.best.save_on_exception=true": "save_on_exception=null",
    "+callbacks.a={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}": "'~callbacks.a'",
    "callbacks.lr_monitor._target_=own_parts.OwnMonitor": "'~callbacks.lr_monitor'",
    "model._target_=own_parts.OwnStep": "OwnStep has its own training_step",
    "+callbacks.timer={_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}": "'~callbacks.timer'",
}


OWN_PARTS = """
from boltlab.callbacks.lr_monitor import LRMonitor
from boltlab.models.classifier import Classifier

class OwnMonitor(LRMonitor):
    def on_train_batch_start(self, *arguments):
        pass

class OwnStep(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.parametrize("override", REFUSED)
def test_what_needs_single_steps_is_refused_with_its_cure(boltlab, override, tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = boltlab("train", *QUICK, "steps_per_execution=4", override)
    assert (code, out) == (2, "")
    assert REFUSED[override] in err and "steps_per_execution=1" in err and err.startswith("boltlab train: 1 mistake")
