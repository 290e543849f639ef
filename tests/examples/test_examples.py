"""Every example is a project that trains, resumes to the bit, evaluates, predicts and loads, in 150 lines."""

import csv
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
SHORT = ("trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=5", "precision=32")
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
    """Copies an example into the test's folder, which lies outside of the repository, and goes there: its folder."""

    def copy(task):
        root = Path(shutil.copytree(EXAMPLES / task, tmp_path / task, ignore=shutil.ignore_patterns("logs")))
        monkeypatch.syspath_prepend(root / "src")
        monkeypatch.chdir(root)
        return root

    yield copy
    for name in [name for name in sys.modules if name.partition(".")[0] in TASKS]:
        del sys.modules[name]


def command(task, *overrides):
    return ("train", f"experiment={task}", *SHORT, *overrides, f"trusted=[{task}]")


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
    trainer = L.Trainer(**quiet)
    if verb == "predict":
        data.setup("test")
        L.seed_everything(0, verbose=False)
        return trainer.predict(model, data.test_dataloader())
    getattr(trainer, verb)(model, datamodule=data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def best_row(run):
    """The row of metrics.csv of the validation that the run has called its best."""
    ((monitor, value),) = runs.read_summary(run)["best"].items()
    with (run / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row.get(monitor) and float(row[monitor]) == value)
    return {key: float(number) for key, number in row.items() if key.startswith("val_") and number}


def flat(batches):
    """All tensors of a prediction, in order."""
    if isinstance(batches, torch.Tensor):
        return [batches]
    parts = batches.values() if isinstance(batches, dict) else batches
    return [tensor for part in parts for tensor in flat(part)]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_example_loads_evaluates_and_predicts_as_with_lightning_alone(boltlab, example, task):
    root = example(task)
    assert boltlab(*command(task))[0] == 0
    run, trusted = only_run(root / "logs"), f"trusted=[{task}]"
    from boltlab import project

    with project.options("eval", [trusted]):
        model = package.load(run)
    assert type(model).__module__ == f"{task}.model" and not model.training
    name = runs.load_config(run).data._target_.rpartition(".")[2]
    data = getattr(sys.modules[f"{task}.data"], name)()

    for split, verb in (("test", "test"), ("val", "validate")):
        code, _, err = boltlab("eval", "run=latest", f"split={split}", "logger=none", trusted)
        assert code == 0, err
        found = runs.read_summary(next(runs.folders("logs", "eval")))["test"]
        assert found and found == with_lightning(model, data, verb)
        trained = runs.read_summary(run)["test"] if split == "test" else best_row(run)
        assert found == pytest.approx(trained, rel=1e-6)

    expected = with_lightning(model, data, "predict")
    code, _, err = boltlab("predict", "run=latest", "output=predictions.pt", trusted)
    assert code == 0, err
    found, expected = (flat(part) for part in (torch.load("predictions.pt", weights_only=True), expected))
    assert torch.equal(torch.cat([x.flatten() for x in found]), torch.cat([x.flatten() for x in expected]))


@pytest.mark.faults
@pytest.mark.parametrize("task", TASKS)
def test_an_example_that_was_killed_twice_resumes_to_the_same_bits(warm, example, task):
    root = example(task)
    overrides = (*command(task, "callbacks.last.every_n_train_steps=1", "test=false"),)

    def run(*arguments, kill=None):
        before = f"sys.path.insert(0, {str(root / 'src')!r})\n" + (at(kill) if kill else "")
        child = warm(*arguments, folder=root, before=before).wait()
        assert child.code == (-signal.SIGKILL if kill else 0), child.stderr[-3000:]

    run(*overrides, "log_dir=whole")
    run(*overrides, "log_dir=killed", kill="0.2")
    resume = ("train", "resume=latest", "log_dir=killed", f"trusted=[{task}]")
    run(*resume, kill="1.3")
    run(*resume)
    whole, found = only_run(root / "whole"), only_run(root / "killed")
    assert differences(outcome(whole), outcome(found)) == []
    assert runs.read_summary(found)["exact"] is True


# metric of the test, and the bound that it must pass: what is known without learning lies far on the other side
LEARNED = {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
def test_an_example_learns(boltlab, example, task):
    root = example(task)
    code, _, err = boltlab("train", f"experiment={task}", "trainer.enable_progress_bar=false", f"trusted=[{task}]")
    assert code == 0, err
    assert LEARNED[task](runs.read_summary(only_run(root / "logs"))["test"])
