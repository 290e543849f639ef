import errno
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boltlab.data.augment import Augment
from boltlab.data.fingerprint import fingerprint
from boltlab.data.image_folder import ImageFolder, check_folder, class_names
from boltlab.data.loader import TensorData
from boltlab.ground.errors import DataError

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "eel": (30, 30, 200)}


def fill(folder, classes=("cat", "dog", "eel"), number=4, suffix=".png"):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            colour = COLOURS.get(name, (9, 9, 9))
            Image.new("RGB", (20, 20), colour).save(folder / name / f"{index}{suffix}")
    return folder


@pytest.fixture
def root(tmp_path):
    for split, number in (("train", 6), ("val", 2), ("test", 3)):
        fill(tmp_path / "images" / split, number=number)
    return tmp_path / "images"


def module(root, **options):
    return ImageFolder(**{"root": str(root), "input_shape": (3, 16, 16), "num_workers": 0, **options})


def colours_and_labels(data, split):
    for images, labels in data.dataloader(split):
        for image, label in zip(images, labels.tolist(), strict=True):
            yield tuple(image[:, 8, 8].tolist()), data.class_names[label]


def test_three_folders(root):
    data = module(root)
    assert (data.num_classes, data.class_names) == (3, ["cat", "dog", "eel"])
    assert ImageFolder.discover({"root": str(root), "class_names": "auto"})["num_classes"] == 3
    for split, number in (("train", 6), ("val", 2), ("test", 3)):
        assert data.class_counts(split).tolist() == [number] * 3
        assert all(COLOURS[name] == colour for colour, name in colours_and_labels(data, split))
    x, _ = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((18, 3, 16, 16), torch.uint8)


def test_a_class_folder_whose_name_is_no_text_has_one(root):
    """Latin-1 bytes, as old archives hold them: configs, logs and trackers take text."""
    for split in ("train", "val", "test"):
        os.rename(os.fsencode(root / split / "dog"), os.fsencode(root / split) + b"/chi\xebn")
    data = module(root)
    assert data.class_names == ["cat", "chi\\xebn", "eel"] and "\n".join(data.class_names).encode()
    assert {(colour, name) for colour, name in colours_and_labels(data, "test")} == {
        (COLOURS["cat"], "cat"), (COLOURS["dog"], "chi\\xebn"), (COLOURS["eel"], "eel"),
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files here")
@pytest.mark.parametrize("options", [{}, {"cache": "memory"}, {"cache": "disk", "cache_format": "jpeg"}])
def test_pipes_and_devices_among_the_images_are_named_and_skipped(root, options, tmp_path):
    os.mkfifo(root / "test" / "cat" / "8.jpg")
    (root / "test" / "dog" / "9.jpg").symlink_to("/dev/zero")
    data = module(root, max_bad_files=2, cache_dir=str(tmp_path / "cache"), **options)
    assert fingerprint(data, "test", contents=True)["files"] == 11
    with pytest.warns(UserWarning, match="this is a pipe or a device, no file"):
        assert len(list(colours_and_labels(data, "test"))) == 9
    assert [reason for _, reason in check_folder(root)] == ["this is a pipe or a device, no file"] * 2


def test_val_is_cut_from_train_and_test_falls_back_to_val_with_a_warning(tmp_path):
    fill(tmp_path / "train", number=10)
    data = module(tmp_path, val_fraction=0.2)
    assert [data.class_counts(split).tolist() for split in ("train", "val")] == [[8] * 3, [2] * 3]
    with pytest.warns(UserWarning, match="no folder 'test': the test split is the validation split"):
        assert data.dataset("test") is data.dataset("val")
    assert not set(data.dataset("train").files) & set(data.dataset("val").files)


def test_other_names_for_val(tmp_path):
    fill(tmp_path / "train", number=5)
    fill(tmp_path / "validation", number=1)
    assert module(tmp_path).class_counts("val").tolist() == [1, 1, 1]


def test_class_folders_straight_in_root(tmp_path):
    fill(tmp_path, number=10)
    data = module(tmp_path, val_fraction=0.25, test_fraction=0.2)
    files = [set(data.dataset(split).files) for split in ("train", "val", "test")]
    assert [len(part) for part in files] == [18, 6, 6]
    assert len(set.union(*files)) == 30
    assert set(module(tmp_path, val_fraction=0.25, test_fraction=0.2, split_seed=3).dataset("test").files) == files[2]
    for split in ("train", "val", "test"):
        assert all(COLOURS[name] == colour for colour, name in colours_and_labels(data, split))


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "test"),
        ("seg_train", "seg_val", "seg_test"),
        ("train2017", "val2017", "test2017"),
        ("TrainImages", "DevImages", "testImages"),
    ],
)
def test_splits_are_known_by_their_words(tmp_path, names):
    for name, number in zip(names, (6, 2, 3), strict=True):
        fill(tmp_path / name, number=number)
    data = module(tmp_path)
    for name, split, number in zip(names, ("train", "val", "test"), (6, 2, 3), strict=True):
        expected = sorted(str(path) for path in (tmp_path / name).rglob("*.png"))
        assert data.dataset(split).files == expected and len(expected) == 3 * number
    assert list(check_folder(tmp_path)) == []


@pytest.mark.parametrize("names", [("Bus", "Train", "valley"), ("valid", "invalid"), ("dev", "prod", "test")])
def test_classes_named_as_splits_are_classes_where_the_config_says_so(tmp_path, names):
    fill(tmp_path, names, number=10)
    with pytest.raises(DataError, match=r"is a class.*data.class_names=\["):
        class_names(tmp_path)
    data = module(tmp_path, class_names=sorted(names), num_classes=len(names))
    assert sum(data.class_counts(split) for split in ("train", "val", "test")).tolist() == [10] * len(names)
    shutil.move(tmp_path, tmp_path.with_name("inner"))
    shutil.move(tmp_path.with_name("inner"), tmp_path / "train")
    fill(tmp_path / "test", names, number=2)  # the splits bear such names, the classes too
    data = module(tmp_path, class_names=sorted(names), num_classes=len(names))
    assert data.class_counts("test").tolist() == [2] * len(names)


ONE, TWO = unicodedata.normalize("NFC", "\u00e9"), unicodedata.normalize("NFD", "\u00e9")
LAYOUTS = {  # folders to fill with the classes, and what is said of them
    "around the classes": (["dataset"], r"'dataset', and 'cat', 'dog', 'eel' stand in .*data.root=\S+/dataset\b"),
    "around the splits": (["a/b/train", "a/b/Val"], r"'a', and 'Val', 'train' stand in .*data.root=\S+/a/b\b"),
    "beside macOS's own": (["pets/train", "__MACOSX/pets"], r"'pets', and 'train' stand in .*data.root=\S+/pets\b"),
    "in each split": (["seg_train/seg_train", "seg_test/seg_test"], r"stand in \S+/seg_train/seg_train: move what"),
    "splits in the classes": (["x/train", "x/test", "y/train", "y/test"], r"'x', 'y', and \S+/x has train, test: the"),
    "val twice": (["train", "val", "validation"], "'train', 'val', 'validation', more than one folder for a split"),
    "train twice": (["Train", "training"], "'Train', 'training', more than one folder for a split"),
    "two sets of splits": (["train_a", "test_a", "train_b", "test_b"], "'test_a', 'test_b', 'train_a', 'train_b', m"),
    "no train": (["Valid", "Test"], "has Valid, Test, but no folder 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_refused_with_what_was_found(tmp_path, layout):
    places, said = LAYOUTS[layout]
    for place in places:
        fill(tmp_path / place)
    with pytest.raises(DataError, match=said):
        class_names(tmp_path)
    assert [bool(re.search(said, reason)) for path, reason in check_folder(tmp_path) if path == tmp_path] == [True]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("split", ["train", "val"])
def test_two_forms_of_one_name_are_refused(tmp_path, split):
    for folder in ("train", "val"):
        fill(tmp_path / folder, [ONE, "x"])
    fill(tmp_path / split, [TWO])
    if len(list((tmp_path / split).iterdir())) < 3:
        pytest.skip("this file system takes both for one name")
    said = f"{split} has two folders named '{ONE}', in two forms of Unicode: join them"
    with pytest.raises(DataError, match=said):
        class_names(tmp_path)
    assert said in dict(check_folder(tmp_path))[tmp_path]
    with pytest.raises(DataError, match=said):  # the classes are known, as those of a run
        module(tmp_path, class_names=["x", ONE], num_classes=2).dataset("train")


@pytest.mark.parametrize(("root", "other"), [(".", "holdout"), (".", "trainval"), ("train", "test")])
def test_a_folder_with_the_same_classes_that_is_no_split_is_named(tmp_path, root, other):
    fill(tmp_path / "train", number=10)
    fill(tmp_path / other)
    fill(tmp_path / "unlabelled", ["0"])
    with pytest.warns(UserWarning, match=f"not used: '{other}' beside \\S+train, with the same classes"):
        module(tmp_path / root, val_fraction=0.2).dataset("train")


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("table", ["val_annotations.txt", "labels.csv", None])
@pytest.mark.parametrize("inside", [".", "images"])
def test_images_without_class_folders_are_named_with_the_cure(tmp_path, split, table, inside):
    for folder in ("train", "val", "test"):
        fill(tmp_path / folder)
    shutil.rmtree(tmp_path / split)
    fill(tmp_path / split, [inside], number=2)
    if table:
        (tmp_path / split / table).write_text("0.png,cat")
    if split == "train" and inside == "images":  # which would be the one class
        with pytest.raises(DataError, match="val lacks 'images'|no class folder"):
            class_names(tmp_path)
        return
    with pytest.raises(DataError) as error:
        class_names(tmp_path)
    assert "its images stand in no class folder: move or link each into that of its class" in str(error.value)
    assert (f"which {table!r} may tell" in str(error.value)) == bool(table)
    assert (f"boltlab predict input={tmp_path / 'test'}" in str(error.value)) == (split == "test")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_the_lines_of_the_docs_sort_images_by_a_table(tmp_path, monkeypatch, delimiter):
    text = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "flat").mkdir()
    rows = ["image,label"]
    for index, (name, colour) in enumerate(sorted(COLOURS.items()) * 10):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "flat" / f"{index}.png")
        rows.append(f"{index},{name}" if index % 2 else f"{index}.png,{name}")  # with the suffix or without
    (tmp_path / "labels.csv").write_text("\n".join(rows).replace(",", delimiter))
    exec(code.replace('delimiter=","', f"delimiter={delimiter!r}"), {})
    data = module(tmp_path / "sorted")
    found = [pair for split in ("train", "val", "test") for pair in colours_and_labels(data, split)]
    assert len(found) == 30 and all(COLOURS[name] == colour for colour, name in found)


@pytest.mark.parametrize("layout", ["", "train"])
def test_small_classes_leave_the_splits_their_size(tmp_path, layout):
    for name, number in (("cat", 1), ("dog", 2), ("eel", 37)):
        fill(tmp_path / layout, [name], number)
    data = module(tmp_path, val_fraction=0.25, test_fraction=0.2)
    splits = ("train", "val", "test") if not layout else ("train", "val")
    assert [len(data.dataset(split)) for split in splits] == ([24, 8, 8] if not layout else [30, 10])
    assert data.class_counts("train").min() == 1


def test_split_lacking_or_renaming_a_class_is_named(root):
    shutil.rmtree(root / "val" / "cat")
    with pytest.raises(DataError, match=r"val lacks 'cat'\n  the classes: 'cat', 'dog', 'eel'"):
        module(root)
    (root / "val" / "Katze").mkdir()
    with pytest.raises(DataError, match=r"val lacks 'cat'\n  val has 'Katze' besides"):
        class_names(root)


def test_split_with_one_class_more_is_named(root):
    fill(root / "test", ["fox"])
    with pytest.raises(DataError, match="test has 'fox' besides"):
        module(root)


def test_class_names_of_the_config_keep_the_labels(root):
    data = module(root, class_names=["eel", "cat", "dog"], num_classes=3)
    assert all(COLOURS[name] == colour for colour, name in colours_and_labels(data, "val"))
    with pytest.raises(DataError, match="train lacks 'fox'"):
        module(root, class_names=["eel", "cat", "dog", "fox"], num_classes=4).dataset("val")


def test_a_saved_run_is_built_without_its_folder(tmp_path):
    data = module(tmp_path / "gone", class_names=["a", "b"], num_classes=2)
    Image.new("RGB", (99, 50)).save("image.png")
    assert data.eval_pixels("image.png").shape == (3, 16, 16)
    with pytest.raises(DataError, match="does not exist"):
        data.dataset("train")


def test_empty_class_folder_is_named(root):
    for file in (root / "train" / "dog").iterdir():
        file.unlink()
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="the folder of class 'dog' holds no image"):
        module(root).dataset("train")


def test_flat_missing_packed_and_halved_folders(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    with pytest.raises(DataError, match="it has no class folder"):
        class_names(flat)
    Image.new("RGB", (4, 4)).save(flat / "a.png")
    with pytest.raises(DataError, match="its images stand in no class folder"):
        class_names(flat)
    with pytest.raises(DataError, match=r"(?s)does not exist \(looked for .*without data of your own: data=digits"):
        class_names(tmp_path / "none")
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is a file, not a folder: unpack it first"):
        class_names(tmp_path / "images.zip")
    fill(tmp_path / "half" / "val")
    with pytest.raises(DataError, match="has val, but no folder 'train'"):
        class_names(tmp_path / "half")


def test_what_is_no_class_and_no_image_is_ignored(root):
    for folder in (root / "train" / ".ipynb_checkpoints", root / "train" / "cat" / ".ipynb_checkpoints"):
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a-checkpoint.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"macOS")
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"Windows")
    (root / "train" / "README.md").write_text("text")
    data = module(root)
    assert data.class_counts("train").tolist() == [6, 6, 6]
    assert list(check_folder(root)) == []


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_but_never_in_a_circle(root, tmp_path):
    fill(tmp_path / "elsewhere", ["more"], number=5)
    train = root / "train"
    (train / "cat" / "loop").symlink_to(train / "cat")
    (train / "cat" / "up").symlink_to(root)
    (train / "cat" / "other_class").symlink_to(train / "dog")
    (train / "loop").symlink_to(train)
    (train / "loop_to_root").symlink_to(root)
    (train / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    data = module(root)
    assert data.class_names == ["cat", "dog", "eel"]
    assert data.class_counts("train").tolist() == [6, 11, 6]
    shutil.rmtree(train / "eel")
    (train / "eel").symlink_to(tmp_path / "elsewhere")
    assert module(root).class_counts("train").tolist() == [6, 11, 5]


def test_names_in_any_script_nested_folders_and_capital_suffixes(tmp_path):
    composed = unicodedata.normalize("NFC", "é, =x")
    fill(tmp_path / "train", [composed, "图像"], number=3)
    fill(tmp_path / "val", [unicodedata.normalize("NFD", composed), "图像"], number=1)
    deep = tmp_path / "train" / "图像" / "2024" / "a b=c,d"
    deep.mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(deep / "A.JPG", format="JPEG")
    data = module(tmp_path)
    assert data.class_names == [composed, "图像"]
    assert data.class_counts("train").tolist() == [3, 4]
    assert data.class_counts("val").tolist() == [1, 1]
    assert sum(len(y) for _, y in data.dataloader("train")) == 7


@pytest.mark.parametrize("decode", ["pillow", "auto"])
def test_every_kind_of_file_has_its_pixels_and_its_label(tmp_path, decode):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, grey in (("a = b, c", 60), ("é 图像", 200)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        flat = Image.new("L", (24, 20), grey)
        for mode in ("L", "LA", "RGB", "RGBA", "P"):
            flat.convert(mode).save(folder / f"{mode} 1,2=3.png")
        Image.fromarray(np.full((20, 24), grey * 257, dtype=np.uint16)).save(folder / "sixteen.png")
        flat.convert("CMYK").save(folder / "cmyk.jpeg", quality=95)
        flat.save(folder / "grey.JPG", quality=95)
        flat.convert("RGB").save(folder / "webp.webp", lossless=True)
        turned = Image.new("RGB", (24, 20), (grey, grey, grey))
        turned.paste((255, 0, 0), (0, 0, 24, 4))  # the stored top is the right side of the upright picture
        turned.save(folder / "turned.jpg", quality=95, subsampling=0, exif=exif)
    data = module(tmp_path / "photos", decode=decode, val_fraction=2, test_fraction=2)
    seen = 0
    for split in ("train", "val", "test"):
        for x, y in data.dataloader(split):
            for image, label in zip(x.int(), y.tolist(), strict=True):
                assert (image[:, 4:12, 4:8] - {0: 60, 1: 200}[label]).abs().max() <= 3
                seen += 1
    assert seen == 20
    upright = data.eval_pixels(str(tmp_path / "photos" / "é 图像" / "turned.jpg"))
    assert upright[0, 8, 15] > 240 and upright[1, 8, 15] < 30 and upright[1, 8, 0] > 190


def spoil(root):
    bad = [root / "train" / "cat" / "1.png", root / "train" / "dog" / "2.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:50])
    bad[1].write_bytes(b"<html>404</html>")
    return bad


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_an_unreadable_file_is_named_with_its_class_and_no_traceback(root, num_workers):
    bad = spoil(root)
    bad[1].unlink()
    with pytest.raises(DataError) as error:
        list(module(root, num_workers=num_workers).train_dataloader())
    first, second = str(error.value).splitlines()
    assert first.startswith(str(bad[0]))
    assert first.endswith("(class 'cat')")
    assert second == "(data.max_bad_files=N skips up to N such files)"


def test_max_bad_files_skips_and_lists_them(root):
    bad = spoil(root)
    loader = module(root, max_bad_files=2, batch_size=4).train_dataloader()
    with pytest.warns(UserWarning, match=r"skipped \([12] of at most 2\)") as warned:
        assert sum(len(y) for _, y in loader) == 16
    assert all(any(str(path) in str(warning.message) for warning in warned) for path in bad)
    loader.sampler.set_epoch(1)
    assert sum(len(y) for _, y in loader) == 16  # a file counts, and is listed, once
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError) as error:
        list(module(root, max_bad_files=1).train_dataloader())
    assert str(error.value).startswith("more than data.max_bad_files=1 unreadable files:")
    assert all(str(path) in str(error.value) for path in bad)


def test_check_folder_finds_every_problem(root):
    bad = spoil(root)
    Image.new("RGB", (4, 4)).save(root / "train" / "stray.png")
    shutil.rmtree(root / "val" / "eel")
    for file in (root / "test" / "cat").iterdir():
        file.unlink()
    found = dict(check_folder(root))
    assert set(found) == {root, *bad, root / "train" / "stray.png", root / "test" / "cat"}
    assert "val lacks 'eel'" in found[root]
    assert found[bad[1]] == "this is a web page or XML, not an image"
    assert [path for path, _ in check_folder(root / "none")] == [root / "none"]


@pytest.mark.skipif("BOLTLAB_REAL_DATA" not in os.environ, reason="BOLTLAB_REAL_DATA is not set: no real photographs")
def test_every_real_photograph_is_readable(tmp_path):
    shutil.unpack_archive(Path(os.environ["BOLTLAB_REAL_DATA"]) / "imagenet-photos-200.tar", tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert len(class_names(folder)) == 200
    assert list(check_folder(folder)) == []


@pytest.fixture
def noisy(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 9), ("val", 3)):
        for name in ("a", "b"):
            folder = tmp_path / "noisy" / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                size = (28 + index, 24, 3)
                pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=95)
    return tmp_path / "noisy"


def batches(data, split):
    loader = data.train_dataloader() if split == "train" else data.dataloader(split)
    return [(x, y) for x, y in loader]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(one, other, strict=True)
    )


def fitting(**options):
    return Augment(input_shape=(3, 16, 16), **{"crop": "padded", "flip_probability": 0.5, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_in_memory_gives_the_batches_of_the_files(noisy, workers):
    for resize in (None, 20):
        options = {"augment": fitting(), "batch_size": 5, "resize": resize, "num_workers": workers}
        files, memory = module(noisy, **options), module(noisy, cache="memory", **options)
        for split in ("train", "val"):
            assert equal(batches(files, split), batches(memory, split))
        assert isinstance(memory.train_dataloader().dataset.source, TensorData)


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize(
    ("shape", "resize"), [((3, 16, 16), None), ((3, 16, 16), 20), ((3, 12, 30), None), ((1, 24, 28), None)]
)
def test_evaluation_sees_the_same_pixels_with_any_cache(noisy, cache, shape, resize):
    options = {"input_shape": shape, "resize": resize, "batch_size": 5, "mean": [0.5], "std": [0.5]}
    files = module(noisy, **options)
    cached = module(noisy, cache=cache, cache_dir="cache", **options)
    assert equal(batches(files, "val"), batches(cached, "val"))
    one = Augment(input_shape=shape, crop="resized")
    cached = module(noisy, cache=cache, cache_dir="cache", augment=one, **options)
    assert next(iter(cached.train_dataloader()))[0].shape == (5, *shape)
    assert equal(batches(files, "val"), batches(cached, "val"))


def test_a_passing_fault_is_not_kept_in_the_cache(noisy, monkeypatch):
    options = {"cache": "disk", "cache_dir": "cache"}

    def no_handle(*_):
        raise DataError("0.jpg: Too many open files") from OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("boltlab.data.cache.read_pixels", no_handle)
        patch.setattr("boltlab.data.cache.plain_jpeg", lambda *_: None)
        with pytest.raises(DataError, match="no fault of the file"):
            batches(module(noisy, **options), "val")
    assert len(batches(module(noisy, **options), "val")[0][1]) == 6


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_a_cache_that_keeps_every_pixel_changes_nothing(noisy, cache, crop):
    options = {"augment": fitting(crop=crop), "batch_size": 5, "input_shape": (3, 16, 16)}
    files = module(noisy, **options)
    cached = module(noisy, cache=cache, cache_size=100, cache_dir="cache", **options)  # nothing is shrunk to 100
    for split in ("train", "val"):
        assert equal(batches(files, split), batches(cached, split))


def test_a_cache_on_disk_is_found_again_and_notices_changes(noisy, monkeypatch):
    options = {"augment": fitting(crop="resized"), "cache": "disk", "cache_dir": "cache", "batch_size": 5}
    first = batches(module(noisy, **options), "train")
    assert first[0][0].shape == (5, 3, 16, 16)
    built = []
    monkeypatch.setattr("boltlab.data.cache._build", lambda *arguments: built.append(arguments))
    assert equal(batches(module(noisy, **options), "train"), first)
    assert not built
    os.utime(noisy / "train" / "a" / "0.jpg", (1, 1))
    with pytest.raises(DataError):  # not built, so not there
        batches(module(noisy, **options), "train")
    assert built


def test_a_cache_of_small_images_on_disk_is_taken_by_whole_batches(root):
    data = module(root, input_shape=(3, 20, 20), cache="disk", cache_dir="cache", augment=None)
    source = data.train_dataloader().dataset.source
    assert isinstance(source, TensorData)
    assert equal(batches(data, "train"), batches(module(root, input_shape=(3, 20, 20)), "train"))


def test_unreadable_files_are_left_out_of_a_cache_in_memory(noisy):
    (noisy / "train" / "b" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b.3.jpg: not an image.*class 'b'"):
        batches(module(noisy, cache="memory"), "train")
    data = module(noisy, cache="memory", max_bad_files=1)
    with pytest.warns(UserWarning, match="skipped .1 of at most 1."):
        seen = torch.cat([y for _, y in batches(data, "train")])
    assert seen.bincount().tolist() == [9, 8]
    for cache in ("disk", "memory"):
        stored = module(noisy, cache=cache, cache_dir="cache", max_bad_files=1, augment=fitting(crop="resized"))
        with pytest.warns(UserWarning, match="skipped .1 of at most 1."):
            assert sum(len(y) for _, y in batches(stored, "train")) == 17


def test_a_folder_that_does_not_fit_in_memory(noisy, monkeypatch):
    monkeypatch.setattr("boltlab.data.memory.available_memory", lambda: 5000)
    with pytest.raises(DataError, match="18 images in each of 1 .* need 1.38e-05 GB .* data.cache=disk"):
        batches(module(noisy, cache="memory"), "train")


@pytest.mark.parametrize("layout", ["train", "."])
def test_folds_of_a_folder_without_val(tmp_path, layout):
    fill(tmp_path / layout, number=10)
    data = [module(tmp_path, folds=3, fold=fold, test_fraction=0.2, seed=fold) for fold in range(3)]
    number = 10 if layout == "train" else 8
    vals = [file for each in data for file in each.dataset("val").files]
    assert len(vals) == len(set(vals)) == 3 * number
    for each in data:
        assert {*each.dataset("train").files, *each.dataset("val").files} == set(vals)
        assert (each.class_counts("val") - number / 3).abs().max() < 1
        assert all(COLOURS[name] == colour for colour, name in colours_and_labels(each, "val"))
        if layout == ".":
            assert each.dataset("test").files == data[0].dataset("test").files
            assert not {*each.dataset("test").files} & set(vals)
    with pytest.raises(DataError, match=f"data.folds=20: samples of class 'cat' beside the test set: {number}"):
        module(tmp_path, folds=20, fold=0, test_fraction=0.2).dataset("train")


def test_folds_of_a_folder_with_val_are_refused(root):
    message = f"{root / 'val'} is a validation set of its own"
    with pytest.raises(DataError, match=f"data.folds=5: {re.escape(message)}"):
        module(root, folds=5, fold=0).dataset("train")
    found = ImageFolder.check_arguments({"root": str(root), "folds": 5, "fold": 0})
    assert [(name, message in text) for name, text in found] == [("folds", True)]
    (root / "val").rename(root / "elsewhere")
    assert ImageFolder.check_arguments({"root": str(root), "folds": 5, "fold": 0}) == []


def test_a_fixed_part_of_the_training_files(root):
    data = module(root, max_samples=9)
    assert [data.class_counts(split).tolist() for split in ("train", "val", "test")] == [[3] * 3, [2] * 3, [3] * 3]
    assert set(data.dataset("train").files) < set(module(root).dataset("train").files)
    assert data.dataset("train").files == module(root, max_samples=9, seed=4).dataset("train").files
    assert all(COLOURS[name] == colour for colour, name in colours_and_labels(data, "train"))
