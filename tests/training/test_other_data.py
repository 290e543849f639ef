"""`eval` on data that were not trained on: all of them, with what the run has fitted; against numpy in float64."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.data.tabular import CSV

pytestmark = pytest.mark.slow

QUICK = ("model=linear", "trainer.max_epochs=3", "optimizer.lr=0.05", "logger=csv", "trainer.accelerator=cpu")
CENTRES = np.array([[0, 0], [4, 0], [0, 4]])
KINDS = ["oak", "ash", "elm"]


def write(path, names, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([names, *rows])


def flowers(path, count, shift, seed, names=("a", "b", "kind"), kinds=KINDS):
    """Rows of three classes; those of another `shift` lie elsewhere, so that their own mean is a wrong one."""
    rng = np.random.default_rng(seed)
    labels = [KINDS.index(kind) for kind in rng.choice(kinds, count)]
    columns = dict(zip(("a", "b"), (rng.normal(size=(count, 2)) + CENTRES[labels] + shift).T, strict=True))
    columns |= {"kind": [KINDS[label] for label in labels], "id": range(count)}
    write(path, names, zip(*(columns[name] for name in names), strict=True))


def prices(path, count, shift, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 2)) * [3, 50] + shift
    write(path, ("a", "b", "price"), np.column_stack([x, x @ [2, 0.1] + 100 + rng.normal(size=count)]).tolist())


def column(path, *names):
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [[row[name] for name in names] for row in rows]


def numbers(path, *names):
    return np.array(column(path, *names), dtype=np.float64)


def training_rows(path, **options):
    data = CSV(path=str(path), **options)
    return data.three_splits(data.table()[1], data.test_fraction)["train"].numpy()


def weights(run):
    state = checkpoint_file.read(run / "checkpoints" / "best.ckpt")["state_dict"]
    return (state[f"net.layers.0.{name}"].double().numpy() for name in ("weight", "bias"))


def run_of(boltlab, *arguments):
    code, _, err = boltlab("train", *QUICK, *arguments)
    assert code == 0, err
    return next(runs.folders("logs"))


def metrics():
    return runs.read_summary(next(runs.folders("logs", "eval")))["test"]


def evaluated(boltlab, *arguments):
    code, out, err = boltlab("eval", "run=latest", "logger=none", *arguments)
    assert code == 0, err
    return metrics(), out


@pytest.fixture
def trained(boltlab):
    flowers("a.csv", 300, 0, seed=0)
    return run_of(boltlab, "data=csv", "data.path=a.csv", "data.target=kind", "data.task=classification")


GROUP = ("data=csv", "data.target=kind", "data.task=classification")


@pytest.mark.parametrize(
    ("names", "kinds", "arguments"),
    [
        (("a", "b", "kind"), KINDS, ()),
        (("a", "b", "kind"), KINDS, GROUP),
        (("a", "b", "kind"), KINDS, ("data=csv",)),  # what the group leaves open is the run's
        (("id", "kind", "b", "a"), KINDS, ()),
        (("id", "kind", "b", "a"), KINDS, GROUP),
        (("a", "b", "kind"), KINDS[1:], ()),
        (("b", "a", "kind"), KINDS[1:], GROUP),
    ],
    ids=["value", "group", "open", "reordered", "reordered group", "class missing", "class missing group"],
)
def test_every_row_of_another_table_is_standardized_as_in_training(boltlab, trained, names, kinds, arguments):
    flowers("b.csv", 90, 1.5, 1, names, kinds)
    rows = numbers("a.csv", "a", "b")[training_rows("a.csv", target="kind", task="classification")]
    weight, bias = weights(trained)
    logits = (numbers("b.csv", "a", "b") - rows.mean(0)) / rows.std(0) @ weight.T + bias
    labels = np.array([sorted(KINDS).index(kind) for (kind,) in column("b.csv", "kind")])
    expected = (logits.argmax(1) == labels).mean()
    loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(90), labels]).mean()

    found, out = evaluated(boltlab, "data.path=b.csv", *arguments)
    assert found["test_acc"] == pytest.approx(expected, abs=1e-6)
    assert found["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert "test split: all 90 samples of b.csv, not the data trained on" in out
    assert evaluated(boltlab, "data.path=b.csv", "split=val", *arguments)[0]["val_acc"] == found["test_acc"]


def trained_config(run):
    return checkpoint_file.read(run / "checkpoints" / "best.ckpt")["config"]


@pytest.mark.parametrize("arguments", [(), ("data=csv", "data.target=price", "data.task=regression")])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_regression_keeps_the_unit_of_its_training(boltlab, scaled, arguments):
    prices("a.csv", 200, 0, seed=0)
    prices("b.csv", 70, [6, 90], seed=1)
    table = {"target": "price", "task": "regression"}
    run = run_of(boltlab, "data=csv", "data.path=a.csv", "data.target=price", "data.task=regression",
                 f"data.standardize_target={scaled}",
                 "model=linear_regressor", "monitor=val_mse", "mode=min")  # fmt: skip
    train = training_rows("a.csv", **table)
    x, y = numbers("a.csv", "a", "b")[train], numbers("a.csv", "price")[train, 0]
    weight, bias = weights(run)
    output = ((numbers("b.csv", "a", "b") - x.mean(0)) / x.std(0) @ weight.T + bias)[:, 0]
    target = numbers("b.csv", "price")[:, 0]
    target = (target - y.mean()) / y.std() if scaled else target
    found, _ = evaluated(boltlab, "data.path=b.csv", *arguments)
    assert found["test_mse"] == pytest.approx(((output - target) ** 2).mean(), rel=1e-4)


def moved_copy():
    shutil.move("a.csv", "elsewhere.csv")
    return "elsewhere.csv"


def rewritten():
    write("b.csv", ("b", "kind", "a"), [[f"{b}0", kind, f"{a}000"] for a, b, kind in column("a.csv", "a", "b", "kind")])
    return "b.csv"


def linked():
    (folder := Path("links")).mkdir()
    (folder / "b.csv").symlink_to(Path("a.csv").absolute())
    return "links/b.csv"


def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return "~/a.csv"


@pytest.mark.parametrize("arguments", [(), GROUP], ids=["value", "group"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda *_: moved_copy(), "the data trained on at another place"),
        (lambda *_: shutil.copy("a.csv", "copy.csv"), "the data trained on at another place"),
        (lambda *_: rewritten(), "the data trained on at another place"),
        (lambda *_: linked(), ""),
        (lambda *_: f"../{Path.cwd().name}/a.csv", ""),
        (home, ""),
    ],
    ids=["moved", "copied", "rewritten", "linked", "relative", "home"],
)
def test_the_data_of_the_training_are_divided_as_there_wherever_they_lie(
    boltlab, monkeypatch, tmp_path, place, said, arguments
):
    flowers("a.csv", 300, 0, seed=0)
    run = run_of(boltlab, *GROUP, "data.path=a.csv", "data.val_fraction=0.3")
    found, out = evaluated(boltlab, f"data.path='{place(monkeypatch, tmp_path)}'", "split=val", *arguments)
    assert found["val_acc"] == pytest.approx(runs.read_summary(run)["best"]["val_acc"], abs=1e-6)
    assert said in out and "samples of" in out if said else "samples of" not in out


@pytest.mark.parametrize("change", ["feature", "label"])
def test_a_table_that_differs_in_one_cell_is_another(boltlab, trained, change):
    rows = column("a.csv", "a", "b", "kind")
    place, value = (0, "0.5") if change == "feature" else (2, next(k for k in KINDS if k != rows[7][2]))
    rows[7][place] = value
    Path("a.csv").unlink()
    write("b.csv", ("a", "b", "kind"), rows)
    assert "all 300 samples of b.csv, not the data trained on" in evaluated(boltlab, "data.path=b.csv")[1]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([[1, 2, "oak"], [1, 2, "yew"], [1, 2, "fir"]], (), "'fir', 'yew' in column 'kind' are not among"),
        ([[1, 2, "oak"], [1, 2, "yew"]], GROUP, "'yew' in column 'kind' is not among"),
        ([[1, 2, "oak"], ["1e300", 2, "oak"]], (), "b.csv: column 'a', line 3: 1e+300 is no finite number of float32"),
        ([[1, "3.5e38", "oak"]], GROUP, "b.csv: column 'b', line 2: 3.5e+38 is no finite number of float32"),
        ([[1, 2, "oak"]], ("data.features=[a]",), "data.features=['a']: the run was trained on ['a', 'b']"),
    ],
)
def test_what_the_run_cannot_take_is_named(boltlab, trained, rows, arguments, message):
    write("b.csv", ("a", "b", "kind"), rows)
    code, _, err = boltlab("eval", "run=latest", "data.path=b.csv", *arguments)
    assert code == 1 and message in err


def test_a_feature_that_is_not_there_is_named(boltlab, trained):
    write("b.csv", ("a", "c", "kind"), [[1, 2, "oak"]])
    code, _, err = boltlab("eval", "run=latest", "data.path=b.csv")
    assert code == 1 and "b.csv has no column 'b'" in err


def test_a_number_that_only_standardizing_makes_too_large_is_named(boltlab):
    rows = [[n / 1e6, n % 7, KINDS[n % 3]] for n in range(90)]
    write("a.csv", ("a", "b", "kind"), rows)
    run_of(boltlab, *GROUP, "data.path=a.csv")
    write("b.csv", ("a", "b", "kind"), [rows[0], [3e38, 1, "oak"]])
    code, _, err = boltlab("eval", "run=latest", "data.path=b.csv")
    assert code == 1 and "column 'a', line 3: 3e+38 is too large for float32 once it is standardized" in err


def test_a_run_from_before_this_was_kept(boltlab, trained):
    flowers("b.csv", 90, 1.5, seed=1)
    expected = evaluated(boltlab, "data.path=a.csv")[0]
    for path in (trained / "checkpoints").glob("*.ckpt"):
        content = checkpoint_file.read(path)
        assert set(content.pop("CSV")["fitted"]) == {"class_names", "features", "mean", "std"}
        checkpoint_file.write(content, path)
    assert evaluated(boltlab, "data.path=a.csv")[0] == expected
    code, _, err = boltlab("eval", "run=latest", "data.path=b.csv")
    assert code == 1 and "before runs kept what they fit" in err and "train again" in err


def test_a_run_that_is_resumed_keeps_what_it_has_fitted(boltlab, trained):
    def state():
        return checkpoint_file.read(trained / "checkpoints" / "last.ckpt")["CSV"]["fitted"]

    def test_rows():
        return json.loads((trained / "data.json").read_text())["splits"]["test"]["values"]

    before, values = state(), test_rows()
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=4", "data.val_fraction=0.4",
                           "resume_changed=restart_epoch")  # fmt: skip
    assert code == 0, err
    assert torch.equal(state()["mean"], before["mean"]) and test_rows() == values


def test_a_table_is_resumed_exactly(boltlab):
    flowers("a.csv", 300, 0, seed=0)
    options = (*GROUP, "data.path=a.csv", "scheduler=constant")
    whole = run_of(boltlab, *options, "trainer.max_epochs=4")
    run = run_of(boltlab, *options)
    assert boltlab("train", f"resume={run}", "trainer.max_epochs=4")[0] == 0
    states = [checkpoint_file.read(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (whole, run)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


# Images


def fill(folder, number, seed, classes=("cat", "dog", "eel"), suffix=".png"):
    """Noisy images, each class brighter in a channel of its own; with a seed of their own, other ones."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (Path(folder) / name).mkdir(parents=True)
        for index in range(number):
            pixels = rng.integers(0, 200, (4, 4, 3))
            pixels[..., "cde".find(name[0]) % 3] += 40
            Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{name}/{index}{suffix}")


def answers(run, paths):
    """The class of each image, by numpy."""
    weight, bias = weights(run)
    config = trained_config(run)["data"]
    mean, std = (np.array(config[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    for path in paths:
        pixels = np.asarray(Image.open(path), dtype=np.float64).transpose(2, 0, 1) / 255
        logits = weight @ ((pixels - mean) / std).ravel() + bias
        yield ("cat", "dog", "eel")[logits.argmax()]


def accuracy(run, *folders):
    paths = [path for folder in folders for path in Path(folder).glob("*/*.*")]
    right = [found == path.parent.name for found, path in zip(answers(run, paths), paths, strict=True)]
    return np.mean(right), len(right)


FOLDER = ("data=image_folder", "data.input_shape=[3,4,4]", "augment=none")


@pytest.fixture
def trained_on_images(boltlab):
    fill("a", 20, seed=0)
    return run_of(boltlab, *FOLDER, "data.root=a", "data.max_samples=30", "data.mean=[0.3]", "data.std=[0.3]",
                  "data.test_fraction=0.3")  # fmt: skip


@pytest.mark.parametrize("group", [False, True], ids=["value", "group"])
@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        ([""], "cat dog eel", [""]),
        ([""], "eel dog", [""]),
        (["train", "val", "test"], "cat dog eel", ["test"]),
        (["train", "valid"], "cat eel", ["train", "valid"]),
        (["val"], "dog", ["val"]),
        (["test"], "cat dog", ["test"]),
    ],
)
def test_every_image_of_another_folder(boltlab, trained_on_images, folders, classes, expected, group):
    for seed, folder in enumerate(folders, start=1):
        fill(f"b/{folder}".rstrip("/"), 9, seed, classes.split())
    run, swap = trained_on_images, FOLDER[:2] if group else ()
    config = trained_config(run)["data"]
    assert (config["mean"], config["class_names"]) == ([0.3], ["cat", "dog", "eel"])
    found, out = evaluated(boltlab, "data.root=b", *swap)
    right, count = accuracy(run, *(f"b/{folder}".rstrip("/") for folder in expected))
    assert found["test_acc"] == pytest.approx(right, abs=1e-6)
    assert f"test split: all {count} samples of b, not the data trained on" in out


def test_a_folder_that_was_moved_is_divided_as_in_training(boltlab, trained_on_images):
    expected = runs.read_summary(trained_on_images)["test"]["test_acc"]
    shutil.copytree("a", "b")
    found, out = evaluated(boltlab, "data.root=b")
    assert found["test_acc"] == pytest.approx(expected, abs=1e-6)
    assert "test split: 18 samples of b, the data trained on at another place" in out
    shutil.move("a", "c")
    assert evaluated(boltlab, "data.root=c")[0] == found


def test_images_of_the_same_names_and_sizes_are_others(boltlab):
    fill("a", 9, 0, suffix=".bmp")
    run = run_of(boltlab, *FOLDER, "data.root=a")
    fill("b", 9, 1, suffix=".bmp")
    sizes = [{path.stat().st_size for path in Path(root).rglob("*.bmp")} for root in ("a", "b")]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 1
    found, out = evaluated(boltlab, "data.root=b")
    assert "all 27 samples of b, not the data trained on" in out
    assert found["test_acc"] == pytest.approx(accuracy(run, "b")[0], abs=1e-6)


@pytest.mark.parametrize("group", [(), FOLDER], ids=["value", "group"])
def test_a_class_that_the_run_does_not_know_is_named(boltlab, trained_on_images, group):
    fill("b", 3, 1, ["cat", "fox"])
    code, _, err = boltlab("eval", "run=latest", "data.root=b", *group)
    assert code == 1 and "has 'fox' besides" in err


def test_a_folder_without_classes_is_refused(boltlab, trained_on_images):
    Path("b").mkdir()
    code, _, err = boltlab("eval", "run=latest", "data.root=b")
    assert code == 1 and "no classes in b: it has no class folder" in err


def test_predict_names_the_classes_of_the_run(boltlab, trained_on_images):
    run = next(runs.folders("logs"))
    fill("b", 1, 1, ["fox", "ant", "bee"])
    code, out, err = boltlab("predict", "run=latest", "input=a/dog/0.png", "data=image_folder", "data.root=b",
                             "data.class_names=[ant,bee,fox]", "data.num_classes=3", FOLDER[1])  # fmt: skip
    assert code == 0, err
    assert next(csv.DictReader(out.splitlines()))["class"] == next(answers(run, [Path("a/dog/0.png")]))


# Relative paths


def accuracy_of_table(run, path, rows):
    """Of these rows of a table, by numpy, standardized by the training rows of the table `kept.csv`."""
    table = {"target": "kind", "task": "classification"}
    x = numbers("kept.csv", "a", "b")[training_rows("kept.csv", **table)]
    weight, bias = weights(run)
    logits = (numbers(path, "a", "b")[rows] - x.mean(0)) / x.std(0) @ weight.T + bias
    labels = np.array([sorted(KINDS).index(kind) for (kind,) in column(path, "kind")])[rows]
    return (logits.argmax(1) == labels).mean()


@pytest.fixture
def in_project(boltlab, tmp_path, monkeypatch):
    """A run of project/a.csv, and another a.csv in the folder `elsewhere`, which is the current one."""
    for name in ("project", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    flowers("a.csv", 300, 0, seed=0)
    shutil.copy("a.csv", "../elsewhere/kept.csv")
    run = run_of(boltlab, *GROUP, "data.path=a.csv").resolve()
    monkeypatch.chdir(tmp_path / "elsewhere")
    flowers("a.csv", 300, 5, seed=1)
    return run


def eval_from(boltlab, run, *arguments):
    code, out, err = boltlab("eval", f"run={run}", "logger=none", *arguments)
    return (code, err) if code else (metrics()["test_acc"], out)


@pytest.mark.parametrize("moved", ["", "project", "all but the runs"])
def test_a_relative_path_leads_to_what_it_led_to_in_the_training(boltlab, in_project, tmp_path, moved):
    run, rows = in_project, CSV(path="kept.csv", target="kind", task="classification")
    rows = rows.three_splits(rows.table()[1], rows.test_fraction)["test"].numpy()
    if moved == "project":  # as on another machine
        (tmp_path / "project").rename(tmp_path / "there")
        run = tmp_path / "there" / run.relative_to(tmp_path / "project")
    elif moved:
        run = shutil.move(run, tmp_path / "elsewhere" / "run")
    found, _ = eval_from(boltlab, run)
    assert found == pytest.approx(accuracy_of_table(Path(run), "kept.csv", rows), abs=1e-6)
    code, _, err = boltlab("train", f"resume={run}", "trainer.max_epochs=4", "data.num_workers=0")
    assert code == 0, err


@pytest.mark.parametrize("change", ["gone", "another", "one cell", "gone, with a link"])
def test_other_data_are_evaluated_only_where_they_are_asked_for(boltlab, in_project, tmp_path, change):
    trained_on, here = tmp_path / "project" / "a.csv", Path("a.csv")
    if change.startswith("gone"):
        trained_on.unlink()
        if "link" in change:
            trained_on.symlink_to(here.absolute())
    else:
        here = trained_on
        text = here.read_text().splitlines()
        text[7] = "0.5" + text[7][text[7].index(",") :]
        here.write_text("\n".join(text)) if change == "one cell" else flowers(here, 300, 5, seed=1)
    code, said = eval_from(boltlab, in_project)
    assert code == 1 and "the data are not those that" in said and "data.path=" in said and "evaluates them" in said
    found, out = eval_from(boltlab, in_project, f"data.path={here}")
    assert f"all 300 samples of {here}, not the data trained on" in out
    assert found == pytest.approx(accuracy_of_table(in_project, here, slice(None)), abs=1e-6)
