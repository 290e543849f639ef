import numpy as np
import pytest
from PIL import Image

from boltlab.data.augment import Augment
from boltlab.data.grid import count_classes, draw_grid
from boltlab.data.image_folder import ImageFolder
from project.data.digits import Digits

pytestmark = pytest.mark.floats


def test_grid_shows_the_pixels_that_the_model_gets(tmp_path):
    for name, colour in (("red $x$", (250, 0, 0)), ("图像_" * 9, (0, 0, 250))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name / f"{number}.png")
    data = ImageFolder(root=str(tmp_path / "images"), input_shape=(3, 8, 8), val_fraction=2, test_fraction=2)
    path = draw_grid(data, tmp_path / "new" / "grid.png", split="train", count=8, columns=4)
    picture = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    colours, numbers = np.unique(picture, axis=0, return_counts=True)
    share = {tuple(map(int, c)): n / len(picture) for c, n in zip(colours, numbers, strict=True)}
    assert share[250, 0, 0] > 0.1
    assert share[250, 0, 0] == pytest.approx(share[0, 0, 250], rel=0.1)


def test_train_is_augmented_and_the_other_splits_are_not(tmp_path):
    plain, augmented = Digits(), Digits(augment=Augment(input_shape=(1, 28, 28), crop="padded"))

    def picture(data, split):
        return np.asarray(Image.open(draw_grid(data, tmp_path / "grid.png", split, count=6, columns=3)))

    assert not np.array_equal(picture(plain, "train"), picture(augmented, "train"))
    assert np.array_equal(picture(augmented, "train"), picture(augmented, "train"))
    assert np.array_equal(picture(plain, "val"), picture(augmented, "val"))


def test_counts_of_every_split():
    counts = count_classes(Digits())
    assert {split: int(numbers.sum()) for split, numbers in counts.items()} == {"train": 1294, "val": 144, "test": 359}
