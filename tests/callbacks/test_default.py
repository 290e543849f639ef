"""All default callbacks and loggers together, from the shipped YAMLs, with every warning an error."""

import csv
import logging

import pytest
from hydra.utils import instantiate

from boltlab.config.compose import compose as train_config


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.slow
def test_fit_and_test_leave_a_whole_run_folder(make_trainer, tiny_module, tiny_data, run_dir, capsys, caplog):
    run_dir.mkdir()
    (run_dir / "environment.json").write_text('{"git_commit": "0123abc"}')
    (run_dir / "git.patch").write_text("+1")
    trainer = make_trainer()
    data = tiny_data()
    trainer.fit(tiny_module(), datamodule=data)
    best = str(run_dir / "checkpoints" / "best.ckpt")
    (tested,) = trainer.test(datamodule=data, ckpt_path=best, verbose=False)
    for logger in trainer.loggers:
        getattr(logger, "finish", lambda: None)()

    files = {path.name for path in run_dir.iterdir()}
    assert files == {
        *("checkpoints", "wandb", "metrics.csv", "environment.json", "git.patch"),
        *("confusion_matrix.csv", "confusion_matrix.png", "per_class_accuracy.csv", ".wandb-id"),
        *("mistakes.json", "calibration.json", "summary.json"),
    }
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    table = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in table] == ["1", "3", "5", "7", "8"]
    assert all(row[name] for row in table[1:4:2] for name in ("train_acc", "val_acc", "lr", "samples_per_second"))
    assert float(table[-1]["test_acc"]) == tested["test_acc"]
    out = capsys.readouterr().out
    assert "FLOPs/sample" in out
    assert "epoch 2/2  train_loss" in out
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "boltlab sync" in warned[0]


def test_several_can_be_chosen_and_one_taken_away(composed, tmp_path):
    config = composed("callbacks=[default,early_stopping]", "~callbacks.summary", "logger=[csv,mlflow]")
    assert "early_stopping" in config.callbacks
    assert "best" in config.callbacks
    assert "summary" not in config.callbacks
    assert list(config.logger) == ["metrics", "mlflow"]
    assert composed("callbacks=none", "logger=none").callbacks == {}


def test_the_guard_comes_before_whatever_saves(composed):
    names = list(composed().callbacks)
    assert names.index("nan_guard") < min(names.index("best"), names.index("last"))


@pytest.mark.parametrize("debug", ["fast", "limit", "overfit", "profiler"])
def test_debug_runs_are_short_untracked_and_lie_apart(debug):
    config = train_config("train", [f"debug={debug}"]).config
    assert config.log_dir == "logs/debug"
    assert train_config("train", [f"debug={debug}", "log_dir=elsewhere"]).config.log_dir == "elsewhere"
    assert list(config.logger) == ["metrics"]
    assert config.trainer.max_epochs * (config.trainer.limit_train_batches or config.trainer.overfit_batches) <= 200


def test_the_profile_is_written(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer("debug=profiler", "logger=none", "callbacks=[throughput]")
    trainer.fit(tiny_module(), datamodule=tiny_data())
    assert "run_training_batch" in (run_dir / "fit-profile.txt").read_text()


@pytest.mark.parametrize("name", ["default", "cpu", "ddp"])
def test_the_shipped_trainers_are_built(composed, name):
    trainer = instantiate(composed(f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1").trainer)
    assert trainer.num_devices == 1
    if name == "ddp":
        assert trainer.strategy._timeout.total_seconds() == 300
