"""Every tracker has what metrics.csv has, each value once, after a run was killed and resumed (FAULTS 66)."""

import signal

import pytest
from trackers import READERS, comparable, of_csv, wrong
from waiting import HANG
from warm import at_step, only_run

pytestmark = [pytest.mark.floats, pytest.mark.faults]

QUICK = ("train", "model=linear", "callbacks=[best,last]", "trainer.max_epochs=3", "trainer.accelerator=cpu")
QUICK += ("data.batch_size=128", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "test=false")


def test_each_value_once(warm, tmp_path):
    """Killed twice, of which the second part begins at a checkpoint of the first; against a run that was not."""
    overrides = (*QUICK, "callbacks.last.every_n_train_steps=10")
    trackers = (f"logger=[{','.join(READERS)}]", f"+logger.mlflow.finish_timeout_seconds={HANG}")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = warm(*overrides, "logger=none", folder=tmp_path / "whole").wait()
    for command, step in (((*overrides, *trackers), 17), (("train", "resume=latest"), 29)):
        killed = warm(*command, folder=tmp_path / "killed", before=at_step(step), WANDB_MODE="offline").wait()
        assert killed.code == -signal.SIGKILL, killed.stderr
    ended = warm("train", "resume=latest", folder=tmp_path / "killed", WANDB_MODE="offline").wait()
    assert (whole.code, ended.code) == (0, 0), ended.stderr
    expected = comparable(of_csv(only_run(tmp_path / "whole" / "logs")))
    assert {step for name, step, _ in expected if name == "train_loss_step"} == set(range(33))
    assert set(expected.values()) == {1}
    folder = only_run(tmp_path / "killed" / "logs")
    assert wrong(folder, expected) == {name: [] for name in READERS}
