"""Names that stand in data, of class folders, labels, columns and files, are never read as a config's syntax."""

import csv
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file

SECRET = "hunter" + "2222"  # git.patch of the run may hold this file
NAMES = ["${oc.env:MY_TOKEN}", "${x}", "???", "\\${z}", "a\\\\${seed}", "${", "$1.50$"]
QUICK = ("model=linear", "logger=csv", "trainer.accelerator=cpu", "trainer.max_epochs=1", "data.num_workers=0")


def folders(root, names):
    values = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for k in range(4):
                pixels = values.integers(0, 60, (8, 8, 3)) + 150 * (number % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"${{y}}{k}.png")
    return [
        "data=image_folder",
        "data.root=found",
        "data.input_shape=[3,8,8]",
        "augment=none",
    ]


def table(root, names):
    root.mkdir()
    rows = [{"${oc.env:MY_TOKEN}": i % 7, "???": 1 / (1 + i), "label": names[i % len(names)]} for i in range(140)]
    with (root / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return ["data=csv", "data.path=found/t.csv", "data.target=label", "data.task=classification"]


@pytest.mark.parametrize("make", [folders, table])
@pytest.mark.parametrize("names", [NAMES, ["plain", "???"]], ids=["all", "missing"])
def test_names_of_data_are_taken_as_they_are(boltlab, tmp_path, monkeypatch, make, names):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    given = make(Path("found"), names)
    code, out, err = boltlab("train", *given, *QUICK)
    assert code == 0, err
    folder = runs.find("latest", "logs")
    content = checkpoint_file.read(folder / "checkpoints" / "best.ckpt")
    (fitted,) = [part["fitted"] for part in content.values() if isinstance(part, dict) and "fitted" in part]
    assert fitted["class_names"] == sorted(names)
    assert content["config"]["data"]["num_classes"] == len(names)
    with (folder / "confusion_matrix.csv").open(newline="") as file:
        assert next(csv.reader(file))[1:] == sorted(names)
    code, more, err = boltlab("eval", "run=latest")
    assert code == 0, err
    out += more + err
    before, after = (runs.read_summary(run)["test"] for run in (folder, runs.find("latest", "logs")))
    assert before == after
    assert OmegaConf.to_container(runs.load_config(folder))["data"]["class_names"] == "auto"
    kept = b"".join(path.read_bytes() for path in Path("logs").rglob("*") if path.is_file())
    assert SECRET not in out and SECRET.encode() not in kept
