import importlib.util
import re
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from boltlab.data.tabular import CSV, TableDataModule
from boltlab.ground.errors import DataError
from project.data.tables import Diabetes, SyntheticClasses

pytestmark = pytest.mark.floats

EXAMPLES = Path(__file__).parents[2] / "examples"
FLOWERS = "length,width,kind,comment\n" + "".join(
    f"{n}.5,{n * n},{kind},text {n}\n" for n, kind in enumerate(["rose", "aster", "10", "2"] * 10)
)


def table(tmp_path, text=FLOWERS):
    path = tmp_path / "table, 1.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def classes(tmp_path, text=FLOWERS, **options):
    defaults = {"target": "kind", "task": "classification", "features": ["width", "length"]}
    return CSV(path=table(tmp_path, text), **{**defaults, **options})


def test_classification(tmp_path):
    data = classes(tmp_path)
    assert (data.input_shape, data.num_classes, data.task) == ((2,), 4, "classification")
    assert data.class_names == ["2", "10", "aster", "rose"]  # numbers by value, then text
    x, y = next(iter(data.train_dataloader()))
    assert (x.dtype, y.dtype, x.shape[1:]) == (torch.float32, torch.int64, (2,))
    total = sum(data.class_counts(split) for split in ("train", "val", "test"))
    assert total.tolist() == [10, 10, 10, 10]
    raw = (data.dataset("val").x.double() * data.std + data.mean)[0]
    number = round(raw[1].item() - 0.5)
    assert raw.tolist() == pytest.approx([number**2, number + 0.5], rel=1e-4)  # the order of `features`
    assert data.class_names[data.dataset("val").labels[0]] == ["rose", "aster", "10", "2"][number % 4]


def test_discover_fills_what_the_config_leaves_to_the_data(tmp_path):
    arguments = {"path": table(tmp_path), "target": "kind", "task": "classification", "features": ["length"],
                 "num_classes": "auto", "class_names": "auto", "input_shape": "auto", "batch_size": "x"}  # fmt: skip
    found = CSV.discover(arguments)
    assert found == {"input_shape": (1,), "num_classes": 4, "class_names": ["2", "10", "aster", "rose"]}
    arguments |= {"task": "regression", "target": "width"}
    assert CSV.discover(arguments) == {"input_shape": (1,), "num_classes": None, "class_names": None}
    assert CSV.discover({"target": "kind"}) == {}
    resolved = CSV(**{**arguments, "path": "gone.csv", "input_shape": (1,), "batch_size": 8})
    assert resolved.input_shape == (1,)


def test_standardized_by_the_training_rows_alone():
    data = Diabetes(test_fraction=0.5)
    train, test = data.dataset("train").x.double(), data.dataset("test").x.double()
    torch.testing.assert_close(train.mean(0), torch.zeros(10).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(10).double(), atol=1e-5, rtol=0)
    assert test.mean(0).abs().max() > 0.01
    raw = {tuple(row) for row in load_diabetes(scaled=False).data.round(3).tolist()}
    assert tuple(v + 0.0 for v in (test[0] * data.std + data.mean).numpy().round(3).tolist()) in raw


def test_target_of_a_regression_keeps_its_unit_unless_asked():
    plain, scaled = Diabetes(), Diabetes(standardize_target=True)
    assert plain.task == scaled.task == "regression"
    y = plain.dataset("train").labels
    assert (y.dtype, y.min() >= 25, y.max() <= 346, plain.target_std) == (torch.float32, True, True, 1.0)
    again = scaled.dataset("train").labels * scaled.target_std + scaled.target_mean
    torch.testing.assert_close(again, y)
    assert abs(scaled.dataset("train").labels.mean()) < 1e-5


def test_a_constant_column_becomes_zero(tmp_path):
    text = "a,b,y\n" + "".join(f"7,{n},{n}\n" for n in range(20))
    data = CSV(path=table(tmp_path, text), target="y", task="regression")
    assert data.dataset("train").x[:, 0].tolist() == [0.0] * len(data.dataset("train"))
    assert torch.isfinite(data.dataset("test").x).all()


def test_no_header_row_bom_semicolons_quotes_and_blank_lines(tmp_path):
    text = "\ufeff" + "".join(f'{n} ; "{n}e-1";{n * 2}\n\n' for n in range(20))
    data = CSV(path=table(tmp_path, text), columns=["a", "b", "y"], delimiter=";", target="y", task="regression")
    assert data.feature_columns == ["a", "b"]
    x, y = data.table()
    assert x[3].tolist() == [3.0, pytest.approx(0.3)]
    assert y.tolist() == [2.0 * n for n in range(20)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("length,width,kind\n1,2,a\n1,,b\n,,c\n", {}, r"column 'width' has 2 missing values, the first in line 3"),
        ("length,width,kind\n1,2,a\n1,NaN,b\n", {}, r"column 'width' has a missing value in line 3"),
        ("length,width,kind\n1,2,a\n1,2,\n", {}, r"column 'kind' has a missing value in line 3"),
        (
            FLOWERS,
            {"features": None},
            r"column 'comment', line 2: 'text 0' is not a number; data.features=\[…\] leaves",
        ),
        ("length,width,kind\n1,inf,a\n", {}, r"column 'width', line 2: 'inf' is not a number"),
        ("length,width,kind\n1,2\n", {}, r"line 2: 2 cells, but 3 columns: length, width, kind"),
        ("length,length,kind\n1,2,a\n", {}, r"two columns have the same name"),
        (FLOWERS, {"target": "colour"}, r"has no column 'colour'; it has 'length', 'width', 'kind', 'comment'"),
        (FLOWERS, {"features": ["height"]}, r"has no column 'height'"),
        (FLOWERS, {"features": ["kind"]}, r"data.target=kind is also among data.features"),
        ("kind\na\n", {"features": None}, r"has no column besides the target 'kind'"),
        ("length,width,kind\n", {}, r"has no rows"),
        ("", {}, r"has no rows"),
        (FLOWERS, {"class_names": ["2", "10", "rose"], "num_classes": 3}, r"'aster' in column 'kind' is not among"),
        (FLOWERS, {"delimiter": "ab"}, r"is no CSV file in UTF-8: \"delimiter\" must be a 1-character string"),
        (FLOWERS, {"task": "regression", "target": "kind"}, r"column 'kind', line 2: 'rose' is not a number$"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        classes(tmp_path, text, **options).dataset("train")


NUMBERS = np.random.default_rng(0).normal(size=(30, 3)).round(3)
LABELS = ["NA", "None", "yes"] * 10


def lines(delimiter=",", decimal=".", header="a,b,c,kind", end=""):
    rows = [[*(str(number).replace(".", decimal) for number in row), label]
            for row, label in zip(NUMBERS, LABELS, strict=True)]  # fmt: skip
    return "\n".join(delimiter.join(row) + end for row in [header.split(","), *rows]) + "\n"


QUOTED = re.sub(r"(-?\d+)\.(\d+)", r'"\1,\2"', lines())
FORMS = {  # a file as people have it, what is said of it, and the keys that read it
    "semicolons": (lines(";"), r"'data.delimiter=\";\"'", {"delimiter": ";"}),
    "decimal commas": (lines(";", ","), r"'data.delimiter=\";\"'", {"delimiter": ";", "decimal": ","}),
    "decimal commas, quoted": (QUOTED, r"'data.decimal=\",\"'", {"decimal": ","}),
    "tabs": (lines("\t"), "'data.delimiter=tab'", {"delimiter": "tab"}),
    "bars": (lines("|"), r"'data.delimiter=\"\|\"'", {"delimiter": "|"}),
    "a comment on top": ("# made by hand\n" + lines(), "data.skip_lines=1", {"skip_lines": 1}),
    "Excel's first line": ("sep=;\n" + lines(";"), "data.delimiter", {"skip_lines": 1, "delimiter": ";"}),
    "a comment with as many cells": ("# a,b,c,by hand\n" + lines(), "data.skip_lines=1", {"skip_lines": 1}),
    "a comma at each line's end": (lines(end=","), None, {}),
    "a comma at each row's end": (lines(end=",").replace("kind,", "kind"), None, {}),
    "classes called NA": (lines(), "20 missing values, the first in line 2: 'NA'; if that is a class: 'data.mis", {}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_table_as_people_have_it_is_read_or_named_with_the_key_that_reads_it(tmp_path, form):
    text, said, keys = FORMS[form]
    options = {"target": "kind", "task": "classification", "missing": [""]}
    if said is not None:
        first = options if keys else {**options, "missing": CSV.__dataclass_fields__["missing"].default_factory()}
        with pytest.raises(DataError, match=said):
            CSV(path=table(tmp_path, text), **first).table()
    data = CSV(path=table(tmp_path, text), **options, **keys)
    x, y = data.table()
    assert data.class_names == sorted(set(LABELS)) and [data.class_names[label] for label in y] == LABELS
    assert np.array_equal(x.numpy(), NUMBERS) and data.input_shape == (3,)


@pytest.mark.parametrize("cell", ["1.234,5", "1.234", "1_000", '"1,234.5"'])
def test_a_number_that_could_be_two_is_refused(tmp_path, cell):
    text = f"x;y\n{cell};1\n2;3\n"
    with pytest.raises(DataError, match="line 2: .* is not a number"):
        CSV(path=table(tmp_path, text), target="y", task="regression", delimiter=";", decimal=",").table()


def test_a_class_in_two_forms_of_unicode_is_refused(tmp_path):
    text = "x,kind\n" + "".join(f"{n},{unicodedata.normalize(('NFC', 'NFD')[n % 2], 'é')}\n" for n in range(20))
    with pytest.raises(DataError, match="column 'kind' writes 'é' in two forms of Unicode, which would be two classes"):
        classes(tmp_path, text, features=None)


@pytest.mark.parametrize("name", ["", "Id"])
@pytest.mark.parametrize("start", [0, 1, 1000])
def test_an_index_among_the_features_is_named(tmp_path, capsys, name, start):
    rows = [f"{start + n},{n * n % 7},{'ab'[n > 9]}" for n in range(20)]
    path = table(tmp_path, "\n".join([f"{name},x,kind", *rows]))
    CSV(path=path, target="kind", task="classification").dataset("train")
    said = f"{path}: column {name!r} numbers the rows; data.features=[…] leaves out an index\n"
    assert said in capsys.readouterr().out
    CSV(path=path, target="kind", task="classification", features=["x"]).dataset("train")
    CSV(path=path, target="kind", task="classification", features=[name, "x"]).dataset("train")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", [2, 11, 25, 41])  # of train, val or test, wherever the split puts it
@pytest.mark.parametrize("cell", ["1e300", "-1e39", "3.5e38", "nan", "inf", "1e999"])
@pytest.mark.parametrize("column", ["x", "y"])
def test_a_number_that_float32_cannot_hold_is_named(tmp_path, line, cell, column):
    rows = [[str(n % 7), str(n)] for n in range(40)]
    rows[line - 2]["xy".index(column)] = cell
    text = "x,y\n" + "\n".join(map(",".join, rows))
    with pytest.raises(DataError, match=rf"table, 1.csv: column '{column}'.* line {line}"):
        CSV(path=table(tmp_path, text), target="y", task="regression").dataset("train")


class Own(TableDataModule):
    """A table of somebody's own."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y
        self.num_classes = None if y.is_floating_point() else 2

    def table(self):
        return self.x, self.y


@pytest.mark.parametrize("value", [1e39, float("nan"), float("-inf")])
@pytest.mark.parametrize("row", [0, 17, 59])
def test_a_number_that_float32_cannot_hold_is_named_in_any_table(value, row):
    x, y = torch.arange(180).double().reshape(60, 3), torch.arange(60).double()
    x[row, 1] = value
    for target in (y, torch.arange(60) % 2):
        with pytest.raises(DataError, match=f"Own: feature 1, row {row}: .* is no finite number of float32$"):
            Own(x, target).dataset("val")
    y[[row, 3]] = value
    with pytest.raises(DataError, match=rf"Own: target, row {min(row, 3)}: .* \(2 such numbers\)$"):
        Own(torch.ones(60, 3), y).dataset("test")


def test_the_largest_numbers_are_standardized_as_in_float64():
    x = np.where(np.arange(60) % 2, 3e38, -3e38)[:, None] * [1.0, 0.5]
    y = np.linspace(-3.4e38, 3.4e38, 60)
    data = Own(torch.from_numpy(x), torch.from_numpy(y))
    data.standardize_target = True
    train = data.three_splits(torch.from_numpy(y), data.test_fraction)["train"].numpy()
    for ours, values in ((data.dataset("train").x, x), (data.dataset("train").labels, y)):
        expected = (values[train] - values[train].mean(0)) / values[train].std(0)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6)


def test_a_number_that_standardizing_makes_too_large_is_named():
    x = torch.full((60, 2), 1.0).double()
    x[:, 1] += torch.arange(60) * 1e-9
    data = Own(x, torch.arange(60) % 2)
    x[int(data.three_splits(torch.arange(60) % 2, 0.2)["test"][0]), 1] = 3e38
    with pytest.raises(DataError, match=r"Own: feature 1, row \d+: 3e\+38 is too large for float32 once it is stand"):
        data.dataset("train")


MEASURED = "x,y\n" + "".join(f"{n % 7},{n % 281 / 100}\n" for n in range(300))
RARE = "x,y\n" + "".join(f"{n % 7},{'rare' if n in (30, 31) else 'fa' + 'rb' * (n % 2)}\n" for n in range(100))


def test_a_measured_number_as_the_class_is_refused(boltlab, tmp_path):
    path = f"data.path='{table(tmp_path, MEASURED)}'"
    arguments = ("data=csv", path, "data.target=y", "data.task=classification", "model=linear", "logger=none")
    code, _, err = boltlab("train", *arguments)
    assert code == 1 and "cannot split 60 off 300 samples: each of the 281 classes keeps one" in err
    assert "262 of them have no other: '0.19', '0.2', '0.21' and 259 more" in err and "data.task=regression" in err


ONE = {  # what is wrong with the file or the arguments -> the exit code, and the words of its only line
    "data.path=none.csv": (2, "data.path=none.csv does not exist"),
    "data.target=z": (2, "has no column 'z'"),
    "data.features=[y]": (2, "data.target=y is also among data.features"),
    "x,y\n1,a\ntwo,b\n": (1, "column 'x', line 3: 'two' is not a number"),
    "x,y\n1,a\n2,b\n": (1, "cannot split"),
}


@pytest.mark.parametrize("wrong", ONE)
def test_one_mistake_of_the_data_is_one_line_and_leaves_nothing(boltlab, tmp_path, wrong):
    path = table(tmp_path, wrong if "\n" in wrong else "x,y\n1,a\n2,b\n")
    given = [f"data.path='{path}'", "data.target=y", "data.task=classification", "model=linear", "logger=none"]
    code, _, err = boltlab("train", "data=csv", *given, *([] if "\n" in wrong else [wrong]))
    expected, words = ONE[wrong]
    assert code == expected and words in err and "auto" not in err and "Traceback" not in err
    assert err.startswith("boltlab train: 1 mistake ") or code == 1
    assert not list(Path("logs").rglob("config.yaml")) and not any(Path("logs/train").glob("*"))


def test_a_class_that_is_trained_on_alone_is_named_once(boltlab, tmp_path):
    path = f"data.path='{table(tmp_path, RARE)}'"
    arguments = ("data=csv", path, "data.target=y", "data.task=classification", "model=linear", "logger=none")
    code, out, err = boltlab("train", *arguments, "trainer.max_epochs=2")
    assert code == 0, err
    assert out.count("classes without a validation sample: 1 ('rare')") == 1
    assert "classes without" not in boltlab("eval", "run=latest", "logger=none")[1]


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"data.path=none.csv does not exist \(looked for .*none.csv\)"):
        CSV(path="none.csv", target="y", task="regression")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00,")
    with pytest.raises(DataError, match="is no CSV file in UTF-8"):
        CSV(path=str(tmp_path / "binary.csv"), target="y", task="regression")


def test_the_houses_are_what_their_script_makes():
    spec = importlib.util.spec_from_file_location("make_houses", EXAMPLES / "make_houses.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (EXAMPLES / "houses.csv").read_text(encoding="utf-8") == script.houses()
    data = CSV(path=str(EXAMPLES / "houses.csv"), columns=["rooms", "area", "year", "price"], target="price",
               task="regression")  # fmt: skip
    x, y = data.dataset("train").x.double(), data.dataset("train").labels.double()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    residual = y - design @ torch.linalg.lstsq(design, y.unsqueeze(1)).solution.squeeze(1)
    assert 15 < residual.std() < 21  # the noise of the script: 18


def test_synthetic_classes_can_be_told_apart():
    data = SyntheticClasses(num_rows=2000)
    assert (data.input_shape, data.num_classes, data.class_names[-1]) == ((100,), 10, "9")
    assert SyntheticClasses.discover({"num_features": 30, "num_classes": 3}) == {
        "input_shape": [30],
        "class_names": ["0", "1", "2"],
    }
    train, test = data.dataset("train"), data.dataset("test")
    assert torch.equal(test.x, SyntheticClasses(num_rows=2000, seed=3).dataset("test").x)
    centres = torch.stack([train.x[train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(test.x, centres).argmin(1) == test.labels).float().mean()
    assert accuracy > 0.6


def made(kind, tmp_path, **options):
    if kind == "csv":
        return classes(tmp_path, **options)
    if kind == "houses":
        columns = ["rooms", "area", "year", "price"]
        return CSV(path=str(EXAMPLES / "houses.csv"), columns=columns, target="price", task="regression", **options)
    return {"diabetes": Diabetes, "synthetic": partial(SyntheticClasses, num_rows=300)}[kind](**options)


@pytest.mark.parametrize("kind", ["csv", "houses", "diabetes", "synthetic"])
def test_folds_of_a_table(kind, tmp_path):
    plain = made(kind, tmp_path)
    data = [made(kind, tmp_path, folds=4, fold=fold, seed=fold) for fold in range(4)]

    def rows(table, split):
        """Which rows of the table they are."""
        part, (x, _) = table.dataset(split), table.table()
        found = torch.cdist((x - table.mean) / table.std, part.x.double()).argmin(0)
        assert len(set(found.tolist())) == len(part)
        return set(found.tolist())

    shared, vals = rows(plain, "train") | rows(plain, "val"), [rows(each, "val") for each in data]
    assert set.union(*vals) == shared
    assert sum(map(len, vals)) == len(shared)
    assert max(map(len, vals)) - min(map(len, vals)) <= 1
    for each, val in zip(data, vals, strict=True):
        assert rows(each, "train") == shared - val
        assert rows(each, "test") == rows(plain, "test")
        if each.task == "classification":
            counts = plain.class_counts("train") + plain.class_counts("val")
            assert (each.class_counts("val") - counts / 4).abs().max() < 1


def test_a_table_is_standardized_by_the_rows_that_are_kept():
    data = Diabetes(folds=5, fold=2, max_samples=40)
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (40, 71)
    mean = data.dataset("train").x.double().mean(0)
    torch.testing.assert_close(mean, torch.zeros(10).double(), atol=1e-5, rtol=0)
