import os
import unicodedata
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from boltlab.data import fingerprint as fingerprints
from boltlab.data.base import DataModule
from boltlab.data.fingerprint import ROUNDED, differences, fingerprint
from boltlab.data.image_folder import ImageFolder
from boltlab.data.loader import TensorData
from boltlab.data.tabular import CSV
from project.data.digits import Digits


def fill(folder, number=4):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.bmp")
    return folder


@pytest.fixture
def root(tmp_path):
    fill(tmp_path / "images" / "train")
    fill(tmp_path / "images" / "val", 1)
    return tmp_path / "images"


def of_folder(root, split="train", contents=False):
    return fingerprint(ImageFolder(root=str(root), input_shape=(3, 8, 8)), split, contents)


def test_of_a_folder(root):
    found = of_folder(root)
    size = (root / "train" / "cat" / "0.bmp").stat().st_size
    expected = {"samples": 8, "classes": 2, "samples_per_class": [4, 4], "files": 8, "bytes": 8 * size}
    assert {key: found[key] for key in expected} == expected
    assert set(found) == {*expected, "labels", "names_and_sizes"}
    assert set(of_folder(root, contents=True)) == {*found, "contents"}
    assert of_folder(root, "val")["names_and_sizes"] != found["names_and_sizes"]


@pytest.mark.parametrize("contents", [False, True])
def test_place_time_and_listing_order_of_a_folder_change_nothing(root, tmp_path, monkeypatch, contents):
    before = of_folder(root, contents=contents)
    os.utime(root / "train" / "cat" / "0.bmp", (1, 1))
    moved = root.rename(tmp_path / "elsewhere")
    walk, iterdir = os.walk, type(moved).iterdir

    def backwards(*arguments, **options):
        for parent, folders, names in walk(*arguments, **options):
            folders.reverse()
            yield parent, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(type(moved), "iterdir", lambda self: reversed(list(iterdir(self))))
    assert of_folder(moved, contents=contents) == before
    monkeypatch.chdir(moved)
    assert of_folder(".", contents=contents) == before


def test_the_order_in_which_a_data_set_lists_its_files_does_not_count(root):
    data = ImageFolder(root=str(root), input_shape=(3, 8, 8))
    before, files = fingerprint(data, "train", True), data.files("train")
    data.files = lambda split: files[::-1]
    assert fingerprint(data, "train", True) == before


def test_names_that_macos_writes_otherwise_are_the_same(root):
    data = ImageFolder(root=str(root), input_shape=(3, 8, 8))
    composed, apart = (unicodedata.normalize(form, "é.bmp") for form in ("NFC", "NFD"))
    path = str(root / "train" / "cat" / "0.bmp")
    data.files = lambda split: [(composed, path)]
    found = fingerprint(data, "train")
    data.files = lambda split: [(apart, path)]
    assert composed != apart and fingerprint(data, "train") == found


def change(root, what):
    file = root / "train" / "cat" / "1.bmp"
    if what == "added":
        file.with_name("new.bmp").write_bytes(file.read_bytes())
    elif what == "removed":
        file.unlink()
    elif what == "renamed":
        file.rename(file.with_name("new.bmp"))
    elif what == "in another class":
        file.rename(root / "train" / "dog" / "new.bmp")
    elif what == "resized":
        file.write_bytes(file.read_bytes() + b"\0")
    elif what == "two exchanged":
        other = file.with_name("2.bmp")
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("added", "8 samples, now 9"),
        ("removed", "8 samples, now 7"),
        ("renamed", "names or sizes of files"),
        ("in another class", "samples of each class"),
        ("resized", "bytes, now"),
    ],
)
def test_another_file_is_another_folder(root, what, said):
    before = of_folder(root)
    change(root, what)
    assert said in "; ".join(differences(before, of_folder(root)))


@pytest.mark.parametrize("what", ["one bit", "two exchanged"])
def test_contents_are_looked_at_on_request(root, what):
    before, whole = of_folder(root), of_folder(root, contents=True)
    change(root, what)
    assert of_folder(root) == before
    assert differences(whole, of_folder(root, contents=True)) == ["contents of files"]
    assert differences(whole, of_folder(root)) == []  # what only one of them knows says nothing


def test_no_file_is_opened_for_names_and_each_is_looked_at_once(root, monkeypatch):
    data = ImageFolder(root=str(root), input_shape=(3, 8, 8))
    data.dataset("train")
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    monkeypatch.setattr("builtins.open", None)
    fingerprint(data, "train")
    assert sorted(asked) == sorted(data.dataset("train").files)


def test_many_files_are_looked_at_by_threads_to_the_same_hash(root, monkeypatch):
    before = of_folder(root, contents=True)
    monkeypatch.setattr("boltlab.data.many_files._PIECE", 3)
    assert of_folder(root, contents=True) == before


def test_a_link_that_leads_nowhere_is_a_file_without_a_size(root):
    (root / "train" / "cat" / "9.bmp").symlink_to(root / "gone.bmp")
    size = sum(path.stat().st_size for path in (root / "train").rglob("*.bmp") if path.exists())
    for found in (of_folder(root, contents=True), of_folder(root)):
        assert (found["files"], found["bytes"]) == (9, size)


@dataclass(kw_only=True, eq=False, repr=False)
class InMemory(DataModule):
    x: torch.Tensor
    labels: torch.Tensor

    def load(self, split):
        return TensorData(self.x, self.labels)


X, LABELS = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def in_memory(x=X, labels=LABELS, **options):
    return fingerprint(InMemory(x=x, labels=labels, num_classes=3), "train", **options)


def test_in_memory(monkeypatch):
    found = in_memory()
    assert found == in_memory(X.clone(), LABELS.clone()) and set(found) == {
        "samples", "classes", "samples_per_class", "labels", "shape", "dtype", "values",
    }  # fmt: skip
    assert (found["shape"], found["dtype"], found["samples_per_class"]) == ([1, 2, 2], "uint8", [2, 2, 2])
    other = X.clone()
    other[3, 0, 1, 1] ^= 1
    assert differences(found, in_memory(other)) == ["values"]
    assert differences(found, in_memory(labels=LABELS.flip(0))) == ["labels, or their order"]
    assert differences(found, in_memory(X.view(6, 4))) == ["uint8 [1, 2, 2], now uint8 [4]"]
    assert differences(in_memory(X.float()), in_memory(X.float() * 1.001)) == [ROUNDED]
    monkeypatch.setattr(fingerprints, "MOST_BYTES", 23)
    assert "values" not in in_memory() and in_memory(contents=True)["values"] == found["values"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.complex64])
def test_values_of_any_type_are_hashed_as_they_stand_in_memory(dtype):
    values = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(dtype)
    assert in_memory(values.t(), LABELS[:2])["values"] == in_memory(values.t().clone(), LABELS[:2])["values"]
    assert in_memory(values, LABELS[:2])["values"] != in_memory(values.flip(0), LABELS[:2])["values"]


def test_regression_has_no_classes():
    found = in_memory(X, LABELS.float())
    assert "classes" not in found and found["labels"] != in_memory()["labels"]


def table(path, value="5"):
    path.write_text("a,b,y\n" + "".join(f"{i},{i % 4}{value},{i % 2}\n" for i in range(40)), encoding="utf-8")
    return CSV(path=str(path), target="y", task="classification")


def test_of_a_table(tmp_path):
    before = fingerprint(table(tmp_path / "t.csv"), "train", True)
    assert before["files"] == 1 and before["bytes"] == (tmp_path / "t.csv").stat().st_size
    assert fingerprint(table(tmp_path / "t.csv"), "train", True) == before
    (tmp_path / "below").mkdir()
    assert fingerprint(table(tmp_path / "below" / "t.csv"), "train", True) == before
    assert differences(before, fingerprint(table(tmp_path / "u.csv"), "train")) == ["names or sizes of files"]
    assert differences(before, fingerprint(table(tmp_path / "t.csv", "6"), "train", True)) == ["contents of files"]


def test_what_is_recorded_is_what_was_loaded_when_it_is_loaded():
    loaded = []
    data = Digits()
    data.on_load = loaded.append
    data.dataset("train"), data.dataset("train")
    assert loaded == ["train"]
    data.setup("fit")
    assert loaded == ["train", "val"]
