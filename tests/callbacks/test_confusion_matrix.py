import csv

import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from boltlab.callbacks.confusion_matrix import ConfusionMatrix, draw, write_numbers

pytestmark = pytest.mark.floats


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_the_numbers_are_those_of_scikit_learn(make_trainer, tiny_module, tiny_data, run_dir, verb):
    torch.manual_seed(0)
    module, data = tiny_module(), tiny_data(samples=61)
    trainer = make_trainer(callbacks=[ConfusionMatrix(run_dir)])
    getattr(trainer, verb)(module, datamodule=data, verbose=False)
    x, y = (data.loader(2) if verb == "test" else data.loader(1)).dataset.tensors
    module.eval()
    expected = confusion_matrix(y, module.net(x).argmax(1)).tolist()
    header, *body = rows(run_dir / "confusion_matrix.csv")
    assert header[1:] == list("abcd")
    assert [[int(n) for n in row[1:]] for row in body] == expected
    for (name, samples, correct, accuracy), line, kind in zip(
        rows(run_dir / "per_class_accuracy.csv")[1:], expected, range(4), strict=True
    ):
        assert (name, int(samples), int(correct)) == ("abcd"[kind], sum(line), line[kind])
        assert float(accuracy) == pytest.approx(line[kind] / sum(line), abs=1e-4)
    assert (run_dir / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_test_does_not_add_to_the_first(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer(callbacks=[ConfusionMatrix(run_dir, picture=False)])
    for _ in range(2):
        trainer.test(tiny_module(), datamodule=tiny_data(), verbose=False)
    assert sum(int(row[1]) for row in rows(run_dir / "per_class_accuracy.csv")[1:]) == 64
    assert not (run_dir / "confusion_matrix.png").exists()


def test_fitting_and_regression_write_nothing(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer(callbacks=[ConfusionMatrix(run_dir)])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    regression = tiny_data()
    regression.task = "regression"
    trainer.test(tiny_module(), datamodule=regression, verbose=False)
    assert [path.name for path in run_dir.iterdir()] == ["metrics.csv"]


def test_any_class_name_can_be_written_and_drawn(tmp_path):
    names = ["a,b", "$x_1$", "$", "狗", 'say "hi"', "a name that is far too long for an axis", "%d"]
    matrix = torch.eye(7, dtype=torch.int64) * 5
    matrix[2] = 0  # a class without samples
    write_numbers(matrix, names, tmp_path)
    draw(matrix, names, tmp_path / "matrix.png")
    assert rows(tmp_path / "confusion_matrix.csv")[0][1:] == names
    assert rows(tmp_path / "per_class_accuracy.csv")[3] == ["$", "0", "0", ""]


@pytest.mark.parametrize("classes", [2, 21, 200, 201])
def test_pictures_stay_of_a_size_that_can_be_viewed(tmp_path, classes):
    draw(torch.ones(classes, classes, dtype=torch.int64), [f"class {i}" for i in range(classes)], tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        width, height = picture.size
    assert 500 < height < width < 3200
