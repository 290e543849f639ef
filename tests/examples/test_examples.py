"""Every example is a project that trains, resumes to the bit, evaluates, predicts and loads, in 150 lines."""

import csv
import json
import shutil
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from training.kills import at
from warm import differences, only_run, outcome

import boltlab as package
from boltlab import runs

pytestmark = [pytest.mark.floats, pytest.mark.filterwarnings("ignore:.*does not have many workers")]

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
DRAW = {"gan", "char_gpt"}  # in predict_step, which the engine seeds in its own way
SHORT = ("trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=5", "precision=32")
SHORT += tuple(f"trainer.limit_{stage}_batches=2" for stage in ("val", "test", "predict"))
SHORT += ("trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")


def texts(task):
    paths = [path for path in (EXAMPLES / task).rglob("*") if path.suffix in (".py", ".yaml", ".toml")]
    return {path: path.read_text() for path in paths if "logs" not in path.parts}


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_plain_lightning_in_150_lines(task):
    found = texts(task)
    assert sum(text.count("\n") for text in found.values()) <= 150
    assert not [path for path, text in found.items() if path.suffix == ".py" and "boltlab" in text]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Copies an example into the test's folder, installed as `make example` does it, and goes there: its folder."""

    def copy(task):
        root = Path(shutil.copytree(EXAMPLES / task, tmp_path / task, ignore=shutil.ignore_patterns("logs"))).resolve()
        info = tmp_path / "site" / f"{task}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {task}\nVersion: 0.1\n")
        (info / "direct_url.json").write_text(json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}}))
        monkeypatch.setattr("site.getsitepackages", lambda: [str(info.parent)])
        monkeypatch.syspath_prepend(root / "src")
        monkeypatch.chdir(root)
        return root

    yield copy
    for name in [name for name in sys.modules if name.partition(".")[0] in TASKS]:
        del sys.modules[name]


def command(task, *overrides):
    return ("train", f"experiment={task}", *SHORT, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_example_trains_one_step_and_tests(boltlab, example, task):
    root = example(task)
    once = [f"trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    code, _, err = boltlab(*command(task, "trainer.max_epochs=1", *once))
    assert code == 0, err
    summary = runs.read_summary(only_run(root / "logs"))
    assert summary["status"] == "finished" and summary["test"] and summary["exact"] is True


def with_lightning(model, data, verb):
    """What a Trainer of Lightning alone gives."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**quiet, **dict.fromkeys((f"limit_{stage}_batches" for stage in ("val", "test", "predict")), 2))
    if verb == "predict":
        data.setup("test")
        loader = "predict_dataloader" if "predict_dataloader" in vars(type(data)) else "test_dataloader"
        return trainer.predict(model, getattr(data, loader)())
    getattr(trainer, verb)(model, datamodule=data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def best_row(run):
    """The row of metrics.csv of the validation that the run has called its best."""
    ((monitor, value),) = runs.read_summary(run)["best"].items()
    with (run / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row.get(monitor) and float(row[monitor]) == value)
    return {key: float(number) for key, number in row.items() if key.startswith("val_") and number}


def flat(batches):
    """All values of a prediction in one tensor [N]."""
    if isinstance(batches, torch.Tensor):
        return batches.flatten()
    return torch.cat([flat(part) for part in (batches.values() if isinstance(batches, dict) else batches)])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_example_loads_evaluates_and_predicts_as_with_lightning_alone(boltlab, example, task):
    root = example(task)
    assert boltlab(*command(task))[0] == 0
    run = only_run(root / "logs")
    model = package.load(run)
    assert type(model).__module__ == f"{task}.model" and not model.training
    name = runs.load_config(run).data._target_.rpartition(".")[2]
    data = getattr(sys.modules[f"{task}.data"], name)()

    for split, verb in (("test", "test"), ("val", "validate")):
        code, _, err = boltlab("eval", "run=latest", f"split={split}", "logger=none")
        assert code == 0, err
        found = runs.read_summary(next(runs.folders("logs", "eval")))["test"]
        assert found and found == with_lightning(model, data, verb)
        trained = runs.read_summary(run)["test"] if split == "test" else best_row(run)
        assert found == pytest.approx(trained, rel=1e-6)

    found = []
    for output in ("first.pt", "second.pt"):
        code, _, err = boltlab("predict", "run=latest", f"output={output}")
        assert code == 0, err
        found.append(flat(torch.load(output, weights_only=True)))
    expected = flat(with_lightning(model, data, "predict"))
    assert torch.equal(*found) and len(expected) == len(found[0])
    assert task in DRAW or torch.equal(found[0], expected)


@pytest.mark.faults
@pytest.mark.parametrize("task", TASKS)
def test_an_example_that_was_killed_twice_resumes_to_the_same_bits(warm, example, task):
    root = example(task)
    overrides = command(task, "callbacks.last.every_n_train_steps=1", "test=false")
    installed = f"import site\nsite.getsitepackages = lambda: [{str(root.parent / 'site')!r}]\n"
    installed += f"sys.path.insert(0, {str(root / 'src')!r})\n"

    def run(*arguments, kill=None):
        child = warm(*arguments, folder=root, before=installed + (at(kill) if kill else "")).wait()
        assert child.code == (-signal.SIGKILL if kill else 0), child.stderr[-3000:]

    run(*overrides, "log_dir=whole")
    run(*overrides, "log_dir=killed", kill="0.2")
    resume = ("train", "resume=latest", "log_dir=killed")
    run(*resume, kill="1.3")
    run(*resume)
    whole, found = only_run(root / "whole"), only_run(root / "killed")
    assert differences(outcome(whole), outcome(found)) == []
    assert runs.read_summary(found)["exact"] is True


# What the whole training must reach; what needs no learning lies far on the other side.
LEARNED = {
    "char_gpt": lambda test: test["test_bits"] < 0.7 * test["test_bits_unigram"],
    "detection": lambda test: test["test_average_precision"] > 0.6,
    "forecasting": lambda test: test["test_mae"] < 0.8 * test["test_mae_day_before"] < test["test_mae_week_before"],
    "gan": lambda test: test["test_frechet"] < 4 * test["test_frechet_real"],
    "segmentation": lambda test: test["test_iou"] > 0.5,  # 1 / 11 for background everywhere
    "sequence_rnn": lambda test: test["test_acc"] > 0.95,
    "simclr": lambda test: test["test_acc"] > test["test_acc_untrained"] + 0.25,
    "text_classifier": lambda test: test["test_acc"] > 0.6,  # 0.18 for the largest module
    "vae": lambda test: test["test_r2"] > 0.5,  # 0 for the mean image
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
def test_an_example_learns(boltlab, example, task):
    root = example(task)
    code, _, err = boltlab("train", f"experiment={task}", "trainer.enable_progress_bar=false")
    assert code == 0, err
    assert LEARNED[task](runs.read_summary(only_run(root / "logs"))["test"])
