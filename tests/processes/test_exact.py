"""One process and several of them train, evaluate and predict the same: even and uneven sizes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from warm import FORKED, Child, only_run

pytestmark = [pytest.mark.floats, pytest.mark.slow]

TRAIN = ("train", "logger=none", "callbacks=[lr_monitor,best,last]", "trainer.accelerator=cpu", "trainer.max_epochs=2")
TRAIN += ("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "scheduler=one_cycle")
# In float32, training itself soon makes much of what is rounded otherwise.
TRAIN += ("data.batch_size=12", "precision=64")
TABLE = ("data=synthetic", "data.num_features=8", "data.num_informative=4", "data.num_classes=4")
TABLE += ("data.test_fraction=31", "data.val_fraction=25", "model=mlp", "model.net.hidden_sizes=[16]")
HOUSES = ("data=diabetes", "data.test_fraction=31", "data.val_fraction=349", "model=mlp_regressor", "monitor=val_mse")


def rows(train):
    """Synthetic rows, of which so many are trained."""
    return f"data.num_rows={train + 31 + 25}"


CASES = {
    "whole batches": (*TABLE, rows(60)),
    # Of 3 processes one gets no sample of the last batch, and the others one each.
    "a last batch of two, weighted classes": (*TABLE, rows(62), "model.class_weights=balanced", "model.l1=1e-3"),
    "a last batch of five, accumulated": (
        *(*TABLE, rows(65), "data.sampler=balanced"),
        *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "test=false"),
    ),
    "a single sample left over": (*TABLE, rows(61), "trainer.limit_train_batches=0.9", "optimizer=adamw", "test=false"),
    "batch norm": (*TABLE, rows(62), "model.net.batch_norm=true", "trainer.sync_batchnorm=true"),
    "regression": (*HOUSES, "mode=min"),
}


def run(warm, folder, *arguments):
    """`boltlab <arguments>`: the folder where it ran."""
    folder = folder / f"{len(list(folder.iterdir()))}"
    folder.mkdir()
    child = warm(*arguments, folder=folder, before=FORKED).wait()
    assert child.code == 0, child.stderr + child.stdout
    return folder


def trained(folder):
    """Rows of metrics.csv, weights, and the summary of the only run there."""
    found = only_run(folder / "logs")
    with (found / "metrics.csv").open() as file:
        values = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    state = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return (
        values,
        {k: v for k, v in state.items() if k.startswith("net.")},
        json.loads((found / "summary.json").read_text()),
    )


def assert_same(folder, reference, tolerance=1e-11):
    values, weights, summary = trained(folder)
    expected_values, expected_weights, expected_summary = trained(reference)
    assert len(values) == len(expected_values)
    for row, expected in zip(values, expected_values, strict=True):
        assert row == pytest.approx(expected, rel=max(2e-7, tolerance), abs=1e-8)  # those of an epoch are float32
        for key in {"lr", "train_loss_step"} & {*expected}:
            assert row[key] == pytest.approx(expected[key], rel=tolerance)
    assert {k for row in values for k in row} >= {"train_loss", "train_loss_step", "lr", "val_loss"}
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=tolerance, atol=tolerance, msg=name)
    assert summary["steps"] == expected_summary["steps"]
    assert summary.get("test", {}) == pytest.approx(expected_summary.get("test", {}), rel=max(2e-7, tolerance))


@pytest.mark.parametrize("case", CASES)
def test_training(warm, tmp_path, case):
    arguments = (*TRAIN, *CASES[case])
    reference = run(warm, tmp_path, *arguments)
    for processes in (2, 3):
        assert_same(run(warm, tmp_path, *arguments, f"trainer.devices={processes}"), reference)


def test_sharded_training(warm, tmp_path):
    arguments = (*TRAIN, *CASES["batch norm"], "precision=32")  # FSDP2 knows no float64
    reference = run(warm, tmp_path, *arguments)
    assert_same(run(warm, tmp_path, *arguments, "trainer=fsdp", "trainer.devices=2"), reference, tolerance=1e-4)


def test_training_that_skips_a_file(warm, tmp_path):
    """The processes that make a batch have read unequally many of its samples."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        path = tmp_path / "photos" / ("train" if i < 32 else "val") / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "photos" / "train" / "class 0" / "4.png").write_bytes(b"no image")
    photos = (f"data.root={tmp_path}/photos", "data.input_shape=[3,8,8]", "data.max_bad_files=1", "augment=none")
    arguments = (*TRAIN, "data=image_folder", *photos, "model=mlp", "test=false")
    assert_same(run(warm, tmp_path, *arguments, "trainer.devices=2"), run(warm, tmp_path, *arguments))


@pytest.fixture(scope="module")
def digits(warm_server, tmp_path_factory):
    """The folder with a trained net, and with seven digits and a broken file in `photos`."""
    folder = tmp_path_factory.mktemp("digits")
    net = ("model=cnn", "model.net.channels=[4]", "model.net.hidden_sizes=[]", "model.net.batch_norm=true")
    quick = ("callbacks=[best]", "logger=none", "test=false", "trainer.max_epochs=1", "trainer.accelerator=cpu")
    child = Child(warm_server, ("train", *net, *quick, "trainer.limit_train_batches=9"), folder, FORKED, {}).wait()
    assert child.code == 0, child.stderr
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "3 broken.png").write_bytes(b"no image")
    return folder


def evaluated(warm, folder, processes, *arguments):
    """What `boltlab eval` wrote: the metrics, then the confusion matrix and the accuracies of the classes, then
    the worst mistakes and the calibration."""
    before = set(folder.glob("logs/eval/*"))
    more = ("run=latest", "+callbacks.confusion_matrix.picture=false", "data.batch_size=66")
    child = warm("eval", *more, *arguments, f"trainer.devices={processes}", folder=folder, before=FORKED).wait()
    assert child.code == 0, child.stderr
    (found,) = set(folder.glob("logs/eval/*")) - before
    files = [(found / name).read_text() for name in ("confusion_matrix.csv", "per_class_accuracy.csv")]
    values = [json.loads((found / f"{name}.json").read_text()) for name in ("summary", "mistakes", "calibration")]
    pictures = [path.read_bytes() for path in sorted((found / "mistakes").iterdir())]
    return values[0], files, [values[1:], pictures]


def assert_close(found, expected):
    """Equal, but for the rounding of what a net computes in batches of another size."""
    if isinstance(expected, dict):
        assert_close([*found.items()], [*expected.items()])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(("split", "size"), [("test", 359), ("val", 144), ("train", 1294)])
def test_evaluation(warm, digits, split, size):
    expected, files, mistakes = evaluated(warm, digits, 1, f"split={split}")
    assert sum(int(line.split(",")[1]) for line in files[1].splitlines()[1:]) == size
    for processes in (2, 3):
        summary, written, found = evaluated(warm, digits, processes, f"split={split}")
        assert written == files
        assert found[1] == mistakes[1] and len(found[1]) == 24
        assert_close(found[0], mistakes[0])
        loss, expected_loss = (s["test"].pop(f"{split}_loss") for s in (summary, {"test": dict(expected["test"])}))
        assert summary["test"] == {k: v for k, v in expected["test"].items() if k != f"{split}_loss"}  # to the bit
        assert loss == pytest.approx(expected_loss, rel=2e-7)
        assert summary["status"] == "finished" and summary["evaluated"] == expected["evaluated"]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_prediction(warm, digits, batch_size):
    outputs = []
    for processes in (1, 2, 3):
        path = digits / f"out-{processes}-{batch_size}.csv"
        more = ("run=latest", "input=photos", "device=cpu", f"batch_size={batch_size}", f"output={path}", "top_k=3")
        child = warm("predict", *more, f"devices={processes}", folder=digits, before=FORKED).wait()
        assert child.code == 0, child.stderr
        outputs.append((path.read_bytes(), child.stderr))
    assert outputs[0] == outputs[1] == outputs[2]
    table = list(csv.DictReader(outputs[0][0].decode().splitlines()))
    assert [row["file"] for row in table] == [f"photos/{name}.png" for name in (0, 1, 2, "3 broken", 3, 4, 5, 6)]
    assert [bool(row["error"]) for row in table] == [False] * 3 + [True] + [False] * 4
