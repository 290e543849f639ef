import json
import os
from pathlib import Path

from PIL import Image

from boltlab import runs


def test_show_draws_a_grid_and_counts_the_classes(boltlab):
    code, out, err = boltlab("show", "data=digits", "count=8", "output=pictures/grid.png", "augment=basic")
    assert code == 0, err
    with Image.open("pictures/grid.png") as picture:
        assert min(picture.size) > 100 and len(set(picture.convert("L").tobytes())) > 50
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    counts = {row[0]: [int(cell) for cell in row[1:]] for row in rows if row[1].isdigit()}
    assert sum(counts.pop("all")) == 1797 and len(counts) == 10
    assert sum(sum(row) for row in counts.values()) == 1797


def test_show_refuses_tables(boltlab):
    code, _, err = boltlab("show", "data=diabetes")
    assert code == 1 and "draws images" in err


def test_runs_lists_the_newest_first_with_its_status(boltlab):
    code, out, _ = boltlab("runs")
    assert code == 0 and "no run yet" in out
    quick = ("model=linear", "trainer.max_epochs=1", "logger=csv")
    assert boltlab("train", *quick, "name=first")[0] == 0
    assert boltlab("train", *quick, "name=second", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant")[0] == 1
    code, out, _ = boltlab("runs")
    lines = [line for line in out.splitlines() if "digits" in line]
    assert code == 0 and len(lines) == 2
    assert "second" in lines[0] and "failed" in lines[0]
    assert "first" in lines[1] and "finished" in lines[1] and "linear" in lines[1] and "val_acc 0." in lines[1]
    assert "second" in boltlab("runs", "limit=1")[1] and "first" not in boltlab("runs", "limit=1")[1]


def test_a_run_that_was_killed_is_told_from_one_that_runs(boltlab):
    assert boltlab("train", "model=linear", "trainer.max_epochs=1", "logger=csv")[0] == 0
    folder = next(runs.folders("logs"))
    assert "epoch 1 " in boltlab("runs")[1]
    summary = runs.read_summary(folder)
    (folder / "summary.json").write_text(json.dumps({"started": summary["started"], "status": "running", "step": 7}))
    out = boltlab("runs")[1]
    assert "killed" in out and "step 7 " in out
    runs.write_summary(folder, pid=os.getpid())
    (folder / ".lock").unlink()  # a run of before there were locks
    assert "running" in boltlab("runs")[1]
    with runs.lock(folder):  # the lock tells it, whoever has the pid by now
        assert "running" in boltlab("runs")[1]
    assert "killed" in boltlab("runs")[1]


def test_a_summary_that_is_not_as_it_should_be_is_no_crash(boltlab):
    folder = Path("logs/train/odd")
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert "odd" in boltlab("runs")[1]
    for summary in ([], {"best": 3, "test": {"test_acc": "high"}, "started": None, "seconds": "x", "epochs": {}}):
        (folder / "summary.json").write_text(json.dumps(summary))
        code, out, _ = boltlab("runs")
        assert code == 0 and "odd" in out and "unknown" in out
