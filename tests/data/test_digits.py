from pathlib import Path

import torch
import yaml
from sklearn.datasets import load_digits

from boltlab.data.digits import Digits

YAML = yaml.safe_load((Path(__file__).parents[2] / "configs/data/digits.yaml").read_text(encoding="utf-8"))


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
