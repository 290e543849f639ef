"""Run folders as training leaves them, written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from boltlab import runs


def write_run(
    run,
    /,
    config=None,
    metrics=((0, 1.0, 0.5), (1, 0.5, 0.75), (2, 0.25, 0.875)),
    classes=("a", "b"),
    mistakes=2,
    overrides=("data=digits", "model=linear"),
    log_dir="logs",
    verb="train",
    **summary,
):
    """`metrics`: epoch, train_loss, val_acc. Every file that the page reads, but for None."""
    folder = Path(log_dir) / verb / run
    folder.mkdir(parents=True)
    config = {
        "seed": 0,
        "monitor": "val_acc",
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    known = {"status": "finished", "started": 1.7e9, "seconds": 65.0, "data": "digits", "model": "linear"}
    known |= {"best": {"val_acc": 0.875}, "test": {"test_acc": 0.8125}, "samples_per_second": 1234.5}
    runs.write_json(folder / "summary.json", {**known, "data_wait_share": 0.25, **summary})
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=True), encoding="utf-8")
    environment = {"git_commit": "0123abcdef", "git_dirty": True, "cpu": "a fast one", "packages": {"torch": "2.15"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "git.patch").write_text("+1\n")
    if metrics is not None:
        rows = [f"{10 * epoch + 9},{epoch},{loss},{acc}" for epoch, loss, acc in metrics]
        (folder / "metrics.csv").write_text("step,epoch,train_loss,val_acc\n" + "\n".join(rows) + "\n")
    if classes is not None:
        lines = [",".join(["true", *classes])]
        lines += [
            ",".join([f'"{name}"', *("9" if i == j else "1" for j in range(len(classes)))])
            for i, name in enumerate(classes)
        ]
        (folder / "confusion_matrix.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "mistakes").mkdir()
        worst = []
        for number in range(1, mistakes + 1):
            path = f"mistakes/{number:02}.png"
            Image.fromarray(np.full((28, 28), 9 * number, np.uint8)).save(folder / path)
            item = {"index": number, "file": None, "true": classes[0], "predicted": classes[-1], "probability": 0.75}
            worst.append({**item, "picture": path})
        found = {"split": "test", "samples": 40, "mistakes": mistakes, "worst": worst}
        (folder / "mistakes.json").write_text(json.dumps(found))
        bins = [{"from": 0.0, "to": 0.5, "samples": 0, "confidence": None, "accuracy": None}]
        bins += [{"from": 0.5, "to": 1.0, "samples": 40, "confidence": 0.75, "accuracy": 0.5}]
        found = {"split": "test", "samples": 40, "expected_calibration_error": 0.25, "bins": bins}
        (folder / "calibration.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def make_run():
    return write_run


@pytest.fixture
def page(boltlab):
    """The page that `boltlab report <arguments>` writes."""

    def write(*arguments):
        code, _, err = boltlab("report", *arguments)
        assert code == 0, err
        return Path("report.html").read_text(encoding="utf-8")

    return write
