"""A run that cannot resume to the bit says so when it begins, or when it is seen, and in summary.json."""

import json

import pytest
from training.rows import plain

RECORD = tuple(text for text in plain("nets.Recorder", "forms.Numbers") if "every_n_train_steps" not in text)
RECORD += ("trainer.max_epochs=1", "+data.batch_size=8")
CASES = {
    "clock": (["trainer.val_check_interval='00:00:10:00'"], "val_check_interval is a time"),
    "workers in any order": (["+data.form='in any order'"], "in_order=False"),
    "no DataLoader": (["+data.form=numbers"], "is no DataLoader"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_once_and_kept(inside, case, tmp_path):
    arguments, reason = CASES[case]
    code, out, err = inside(*RECORD, *arguments)
    assert code == 0, err
    lines = [line for line in out.splitlines() if reason in line]
    assert len(lines) == 1 and lines[0].startswith("an interrupted run will not resume to the bit: ")
    summary = json.loads(next(tmp_path.glob("logs/train/*/summary.json")).read_text())
    assert summary["exact"] is False and reason in summary["exact_reason"]


def test_an_order_that_the_training_decides_is_noticed_on_resume(inside, tmp_path):
    """9 batches an epoch: broken off in the second one, whose order the first one's steps have decided."""
    arguments = [text.replace("forms.Numbers", "forms.Feeding") for text in RECORD]
    code, out, err = inside(*arguments, "+data.form=fed", "trainer.max_steps=13", "trainer.max_epochs=3")
    assert code == 0 and "to the bit" not in out, err
    summary = next(tmp_path.glob("logs/train/*/summary.json"))
    assert json.loads(summary.read_text())["exact"] is True
    code, out, err = inside("train", "resume=latest", "trainer.max_steps=20")
    assert code == 0, err
    assert out.count("the order of the train loader is another one than before the interruption") == 1
    assert json.loads(summary.read_text())["exact"] is False


def test_a_restarted_epoch_is_not_exact(inside, tmp_path):
    code, _, err = inside(*RECORD, "callbacks.last.every_n_train_steps=1", "trainer.max_steps=3")
    assert code == 0, err
    changed = ("data.batch_size=4", "resume_changed=restart_epoch", "trainer.max_steps=-1")
    code, out, err = inside("train", "resume=latest", *changed)
    assert code == 0, err
    assert out.count("resumed without the state of module and epoch: changed settings") == 1
    assert json.loads(next(tmp_path.glob("logs/train/*/summary.json")).read_text())["exact"] is False


def test_shipped_modules_are_exact(boltlab, tmp_path):
    code, _, err = boltlab("train", "logger=none", "callbacks=[last]", "trainer.max_epochs=1", "data.max_samples=64")
    assert code == 0, err
    assert json.loads(next(tmp_path.glob("logs/train/*/summary.json")).read_text())["exact"] is True
