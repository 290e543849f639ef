import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from boltlab.callbacks.mistakes import Mistakes, calibration
from boltlab.data.image_folder import ImageFolder
from project.data.digits import Digits

pytestmark = pytest.mark.floats


class Fixed(pl.LightningModule):
    """What it says of a sample is the sample itself."""

    def test_step(self, batch, batch_idx):
        return {"output": batch[0].flatten(1).float(), "target": batch[1]}

    validation_step = test_step


class Given(pl.LightningDataModule):
    task = "classification"
    class_names = ("a", "b", "c")

    def __init__(self, output, target, batch_size=16):
        super().__init__()
        self.data, self.batch_size = TensorDataset(output, target), batch_size

    def test_dataloader(self):
        return DataLoader(self.data, self.batch_size)

    val_dataloader = test_dataloader


class Blind(pl.LightningModule):
    """Takes every image for one of the last class, the brighter the more."""

    def __init__(self, classes):
        super().__init__()
        self.steps = torch.linspace(0, 1, classes)

    def test_step(self, batch, batch_idx):
        x, y = batch
        return {"output": (x.flatten(1).mean(1, keepdim=True) + 10) * self.steps, "target": y}


def answers(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, generator=generator) * 2, torch.randint(3, (samples,), generator=generator)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("verb", ["test", "validate"])
@pytest.mark.parametrize("batch_size", [7, 16, 1000])
def test_they_are_those_of_a_direct_computation(make_trainer, run_dir, verb, batch_size):
    output, target = answers(997)
    trainer = make_trainer("trainer.enable_progress_bar=false", callbacks=[Mistakes(run_dir, count=10)])
    getattr(trainer, verb)(Fixed(), datamodule=Given(output, target, batch_size), verbose=False)

    shares = output.softmax(1)
    loss, predicted = -shares.gather(1, target[:, None]).log()[:, 0], output.argmax(1)
    wrong = [i for i in loss.argsort(descending=True, stable=True).tolist() if predicted[i] != target[i]]
    found = read(run_dir, "mistakes")
    assert (found["split"], found["samples"]) == ("val" if verb == "validate" else "test", 997)
    assert found["mistakes"] == len(wrong) > 10
    assert [item["index"] for item in found["worst"]] == wrong[:10]
    for item, i in zip(found["worst"], wrong, strict=False):
        assert (item["true"], item["predicted"]) == ("abc"[target[i]], "abc"[predicted[i]])
        assert item["probability"] == pytest.approx(shares[i].max().item(), rel=1e-5)
        assert item["probability_of_true"] == pytest.approx(shares[i, target[i]].item(), rel=1e-4)
        assert item["loss"] == pytest.approx(loss[i].item(), rel=1e-5)
        assert "picture" not in item and item["file"] is None
    assert not list(run_dir.glob("mistakes*.png"))


@pytest.mark.parametrize("bins", [1, 15, 40])
def test_calibration_is_that_of_torchmetrics(make_trainer, run_dir, bins):
    output, target = answers(2000, seed=1)
    make_trainer(callbacks=[Mistakes(run_dir, bins=bins)]).test(
        Fixed(), datamodule=Given(output, target, 64), verbose=False
    )
    found = read(run_dir, "calibration")
    shares = output.softmax(1)
    expected = MulticlassCalibrationError(3, n_bins=bins)(shares, target).item()
    assert found["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0.05  # these answers are far too sure of themselves
    confidence, predicted = shares.max(1)
    assert found["samples"] == sum(part["samples"] for part in found["bins"]) == 2000
    assert len(found["bins"]) == bins
    for part in found["bins"]:
        inside = (confidence >= part["from"]) & (confidence < part["to"])
        assert part["samples"] == int(inside.sum())
        if part["samples"]:
            assert part["confidence"] == pytest.approx(confidence[inside].mean().item(), abs=1e-6)
            assert part["accuracy"] == pytest.approx((predicted == target)[inside].float().mean().item())
        else:
            assert part["confidence"] is part["accuracy"] is None


def test_a_probability_of_one_is_in_the_last_bin_and_nothing_but_numbers_is_written(make_trainer, run_dir):
    output = torch.tensor([[200.0, 0, 0], [200.0, 0, 0], [float("nan"), 0, 0]])
    trainer = make_trainer(callbacks=[Mistakes(run_dir)])
    trainer.test(Fixed(), datamodule=Given(output, torch.tensor([0, 1, 1])), verbose=False)
    bins = read(run_dir, "calibration")["bins"]
    assert (bins[-1]["samples"], bins[-1]["confidence"], bins[-1]["accuracy"]) == (2, 1.0, 0.5)
    assert bins[0]["samples"] == 1
    worst = read(run_dir, "mistakes")["worst"]
    assert [(item["index"], item["loss"]) for item in worst] == [(2, None), (1, 200.0)]
    assert "NaN" not in (run_dir / "mistakes.json").read_text()


def test_of_equal_mistakes_the_first_are_kept(make_trainer, run_dir):
    output = torch.tensor([[1.0, 0, 0]]).expand(500, 3)
    trainer = make_trainer(callbacks=[Mistakes(run_dir, count=7)])
    trainer.test(Fixed(), datamodule=Given(output, torch.ones(500, dtype=torch.long), 3), verbose=False)
    assert [item["index"] for item in read(run_dir, "mistakes")["worst"]] == list(range(7))


def test_pictures_are_what_evaluation_sees(make_trainer, run_dir):
    data = Digits(batch_size=50)
    trainer = make_trainer(callbacks=[Mistakes(run_dir, count=5)])
    for _ in range(2):  # the second replaces the first
        trainer.test(Blind(10), datamodule=data, verbose=False)
    worst = read(run_dir, "mistakes")["worst"]
    images, labels = data.samples("test", [item["index"] for item in worst])
    assert [item["true"] for item in worst] == [str(label) for label in labels.tolist()]
    for item, image in zip(worst, images, strict=True):
        with Image.open(run_dir / item["picture"]) as picture:
            assert np.array_equal(np.asarray(picture), image[0].numpy())
    assert len(list((run_dir / "mistakes").iterdir())) == 5
    assert (run_dir / "mistakes.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("dark", 20), ("light", 230)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (300, 260), (colour,) * 3).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_files_are_named_and_pictures_are_small(make_trainer, run_dir, folder):
    data = ImageFolder(root=str(folder), input_shape=(3, 250, 290), val_fraction=2, test_fraction=6, num_workers=0)
    make_trainer(callbacks=[Mistakes(run_dir)]).test(Blind(2), datamodule=data, verbose=False)
    worst = read(run_dir, "mistakes")["worst"]
    assert len(worst) == 3
    for item in worst:
        assert item["file"] == data.dataset("test").files[item["index"]]
        assert Path(item["file"]).parent.name == item["true"]
        with Image.open(run_dir / item["picture"]) as picture:
            assert max(picture.size) == 224


def test_where_files_were_skipped_no_sample_is_named_wrongly(make_trainer, run_dir, folder):
    data = ImageFolder(
        root=str(folder), input_shape=(3, 16, 16), val_fraction=2, test_fraction=6, num_workers=0, max_bad_files=1
    )
    Path(data.dataset("test").files[0]).write_bytes(b"")
    trainer = make_trainer(callbacks=[Mistakes(run_dir)])
    with pytest.warns(UserWarning, match="skipped"):
        trainer.test(Blind(2), datamodule=data, verbose=False)
    found = read(run_dir, "mistakes")
    assert found["samples"] == 5
    assert {(item["index"], item["file"], item.get("picture")) for item in found["worst"]} == {(None, None, None)}


def test_fitting_and_regression_write_nothing(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer(callbacks=[Mistakes(run_dir)])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    regression = tiny_data()
    regression.task = "regression"
    trainer.test(tiny_module(), datamodule=regression, verbose=False)
    assert [path.name for path in run_dir.iterdir()] == ["metrics.csv"]


def test_without_a_mistake(make_trainer, run_dir):
    output = torch.eye(3) * 9
    make_trainer(callbacks=[Mistakes(run_dir)]).test(Fixed(), datamodule=Given(output, torch.arange(3)), verbose=False)
    assert read(run_dir, "mistakes") == {"split": "test", "samples": 3, "mistakes": 0, "worst": []}
    assert calibration(torch.zeros(2, 3, dtype=torch.int64))["expected_calibration_error"] is None


def test_a_batch_asks_the_device_for_nothing(run_dir):
    """On the device "meta" tensors have no values: whatever would wait for a GPU's fails there."""
    callback = Mistakes(run_dir)
    given = SimpleNamespace(datamodule=SimpleNamespace(task="classification"))
    callback.on_test_start(given, SimpleNamespace(device=torch.device("meta")))
    for _ in range(130):  # counted twice
        batch = {"output": torch.empty(5, 3, device="meta"), "target": torch.empty(5, dtype=torch.long, device="meta")}
        callback.on_test_batch_end(given, None, batch, None, 0)
    assert callback._seen == 640
    with pytest.raises(RuntimeError, match="meta"):
        callback._counts.sum().item()
