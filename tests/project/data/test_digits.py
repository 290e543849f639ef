import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from project.data.digits import Digits

pytestmark = pytest.mark.floats

YAML = yaml.safe_load((Path(__file__).parents[3] / "configs/data/digits.yaml").read_text(encoding="utf-8"))


def test_splits_are_stratified_and_hold_all_digits():
    data = Digits()
    counts = {split: data.class_counts(split) for split in ("train", "val", "test")}
    assert {split: int(count.sum()) for split, count in counts.items()} == {"train": 1294, "val": 144, "test": 359}
    everything = torch.bincount(torch.from_numpy(load_digits().target))
    assert torch.equal(sum(counts.values()), everything)
    for count in counts.values():
        shares = count / count.sum()
        torch.testing.assert_close(shares, (everything / everything.sum()).float(), atol=0.008, rtol=0)


def test_split_seed_moves_val_alone_and_seed_moves_nothing():
    one, other = Digits(), Digits(split_seed=1, seed=5)
    assert torch.equal(one.dataset("test").x, other.dataset("test").x)
    assert not torch.equal(one.dataset("val").x, other.dataset("val").x)
    assert torch.equal(one.dataset("val").x, Digits(seed=5).dataset("val").x)


def test_images_and_statistics_of_the_config():
    data = Digits()
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.dtype) == ((64, 1, 28, 28), torch.uint8, torch.int64)
    for name in ("num_classes", "class_names", "mean", "std", "allow_flip", "test_fraction"):
        assert YAML[name] == getattr(data, name), name
    pixels = data.normalize(data.dataset("train").x)
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_every_machine_makes_the_same_images():
    data = Digits()
    images = b"".join(data.dataset(split).x.numpy().tobytes() for split in ("train", "val", "test"))
    # By interpolate in 32 bits and its kernels of AVX; without AVX 44 pixels are others.
    expected = "81f7f2d5ede3cd64e65f5415c000c471aceee61dd4ee43000cf17899739049da"
    assert hashlib.sha256(images).hexdigest() == expected


def test_five_folds_hold_every_digit_and_leave_test_alone():
    data = [Digits(folds=5, fold=fold, seed=fold) for fold in range(5)]
    everything = Digits().class_counts("train") + Digits().class_counts("val")
    assert torch.equal(sum(each.class_counts("val") for each in data), everything)
    for each in data:
        assert torch.equal(each.class_counts("val") + each.class_counts("train"), everything)
        assert (each.class_counts("val") - everything / 5).abs().max() < 1
        assert torch.equal(each.dataset("test").x, Digits().dataset("test").x)
    assert torch.equal(data[0].dataset("val").x, Digits(folds=5, fold=0).dataset("val").x)
    assert not torch.equal(data[0].dataset("val").x, Digits(folds=5, fold=0, split_seed=1).dataset("val").x)


def test_a_fixed_part_of_the_training_images():
    data, other = Digits(max_samples=200), Digits(max_samples=200, seed=3)
    assert data.class_counts().tolist() == [20] * 10
    assert torch.equal(data.dataset("train").x, other.dataset("train").x)
    assert torch.equal(data.dataset("val").x, Digits().dataset("val").x)
    assert torch.equal(Digits(max_samples=5000).dataset("train").x, Digits().dataset("train").x)
