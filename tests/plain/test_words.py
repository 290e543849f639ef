"""The words of the most used template: those that mean the same work, the others are answered with ours."""

import csv
import re
from pathlib import Path

import pytest
from warm import differences, outcome

from boltlab import runs

pytestmark = pytest.mark.slow

QUICK = ("model=linear", "logger=csv", "trainer.accelerator=cpu", "scheduler=constant", "optimizer=sgd", "precision=32")


def test_train_ckpt_path_begins_a_new_run_from_the_complete_state(boltlab):
    assert boltlab("train", *QUICK, "trainer.max_epochs=1")[0] == 0
    first = next(runs.folders("logs"))
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    code, _, err = boltlab("train", *QUICK, "trainer.max_epochs=3", f"ckpt_path={first}/checkpoints/last.ckpt")
    assert code == 0, err
    second = next(runs.folders("logs"))
    assert second != first and {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == kept
    assert boltlab("train", *QUICK, "trainer.max_epochs=3")[0] == 0
    whole = next(runs.folders("logs"))
    continued, straight = outcome(second), outcome(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert not differences(continued[part], straight[part])
    summary, rows = runs.read_summary(second), csv.DictReader((second / "metrics.csv").read_text().splitlines())
    best = max(float(row["val_acc"]) for row in rows if row["val_acc"])  # of its own epochs, as Lightning has it
    assert summary["status"] == "finished" and summary["best"] == {"val_acc": best}
    assert boltlab("eval", f"run={second}")[0] == 0
    (evaluated,) = Path("logs/eval").iterdir()
    assert runs.read_summary(evaluated)["test"] == summary["test"]
    assert runs.read_summary(second)["ckpt_path"] == str((first / "checkpoints" / "last.ckpt").resolve())


def test_a_state_that_does_not_fit_begins_nothing(boltlab, tmp_path):
    assert boltlab("train", *QUICK, "trainer.max_epochs=1", "test=false")[0] == 0
    path = next(runs.folders("logs")) / "checkpoints" / "last.ckpt"
    code, _, err = boltlab("train", *QUICK, "optimizer.lr=0.5", f"ckpt_path={path}")
    assert code == 1 and "optimizer.lr was" in err and "init_from=" in err
    code, _, err = boltlab("train", *QUICK, f"ckpt_path={tmp_path}/nowhere.ckpt")
    assert code == 1 and "nowhere.ckpt" in err
    assert len(list(runs.folders("logs"))) == 1


def test_eval_ckpt_path_is_the_run_and_its_checkpoint(boltlab):
    assert boltlab("train", *QUICK, "trainer.max_epochs=2")[0] == 0
    run = next(runs.folders("logs"))
    for which in ("best", "last"):
        found = []
        for given in ((f"ckpt_path={run}/checkpoints/{which}.ckpt",), (f"run={run}", f"checkpoint={which}")):
            assert boltlab("eval", *given, "logger=none")[0] == 0
            summary = runs.read_summary(next(runs.folders("logs", "eval")))
            found.append((summary["test"], summary["checkpoint"], summary["evaluated"]))
        assert found[0] == found[1]
    code, _, err = boltlab("eval", "ckpt_path=some.ckpt")
    assert code == 2 and "run=FOLDER" in err


WORDS = {
    ("train", "logger=many_loggers"): "logger=[wandb,tensorboard,mlflow]",
    ("train", "hparams_search=mnist_optuna"): "boltlab sweep sweep=NAME",
    ("train", "task_name=mine"): "name=…",
    ("train", "paths.data_dir=/data"): "data_dir=…",
    ("train", "debug=fdr"): "debug=fast",
    ("bench", "ckpt_path=a.ckpt"): "run=FOLDER",
}


@pytest.mark.parametrize(("verb", "word"), WORDS)
def test_a_word_that_means_something_else_is_answered_with_how_it_is_written(boltlab, verb, word):
    code, out, err = boltlab(verb, word)
    assert code == 2 and not out and f"  {word}\n" in err and WORDS[verb, word] in err


def test_a_training_without_data_and_model_says_what_there_is(boltlab, inside):
    code, _, err = boltlab("train", "logger=csv")
    assert code == 2 and "takes dict" not in err
    for group, choice in (("data", "cells_digits"), ("model", "cells_vae")):
        (line,) = re.findall(rf"  {group}=null\n      (.*)\n", err)
        assert line.startswith("is no choice; choices: ") and choice in line
    assert boltlab("show", "data=null")[2].count("data=null") == 1
