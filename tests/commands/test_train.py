import csv
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from waiting import HANG, until

import boltlab
from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config import auto as machine
from boltlab.config.compose import compose
from boltlab.processes import submit as launched
from boltlab.training import start as train

pytestmark = pytest.mark.floats

QUICK = ("model=linear", "trainer.max_epochs=2", "logger=csv", "data.batch_size=256", "trainer.accelerator=cpu")


def only_run(verb="train"):
    (folder,) = runs.folders("logs", verb)
    return folder


def test_a_run_leaves_everything_in_its_folder(boltlab):
    code, out, err = boltlab("train", *QUICK, "name=my run")
    folder = only_run()
    assert code == 0, err
    assert str(folder) in out and "test_acc" in out
    assert "my-run" in folder.name
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files >= {
        "config.yaml", "overrides.yaml", "environment.json", "git.patch", "metrics.csv", "summary.json", "classes.json",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "confusion_matrix.png", "confusion_matrix.csv",
    }  # fmt: skip
    assert "${" not in (folder / "config.yaml").read_text().replace("${run_dir}", "")
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*QUICK, "name=my run"]
    assert json.loads((folder / "classes.json").read_text()) == list("0123456789")
    summary = runs.read_summary(folder)
    assert summary["status"] == "finished" and summary["epochs"] == 2 and summary["steps"] == 12
    assert {"test_acc", "test_f1", "test_loss", "test_top5"} <= set(summary["test"])
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates, waits = ([float(row[n]) for row in rows if row[n]] for n in ("samples_per_second", "data_wait_share"))
    assert summary["samples_per_second"] == pytest.approx(statistics.harmonic_mean(rates), rel=0.01)
    assert min(waits) - 1e-3 <= summary["data_wait_share"] <= max(waits) + 1e-3
    logged = [float(row["val_acc"]) for row in rows if row.get("val_acc")]
    assert len(logged) == 2 and max(logged) == pytest.approx(summary["best"]["val_acc"], abs=1e-4)
    (test_acc,) = [float(row["test_acc"]) for row in rows if row.get("test_acc")]
    assert test_acc == pytest.approx(summary["test"]["test_acc"], abs=1e-4)


def test_last_is_the_newest_step_where_the_metric_gets_worse_every_epoch(boltlab):
    rising = ("trainer.max_epochs=3", "scheduler=constant", "optimizer.lr=1e-3", "monitor=val_loss", "test=false")
    assert boltlab("train", *QUICK, *rising, "+optimizer.maximize=true")[0] == 0
    folder = only_run()
    with (folder / "metrics.csv").open() as file:
        worse = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert len(worse) == 3 and worse[0] < worse[1] < worse[2]  # the first is the best
    last, best = (checkpoint_file.read(folder / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    steps = runs.read_summary(folder)["steps"]
    assert (last["global_step"], best["global_step"]) == (steps, steps // 3)
    assert not torch.equal(last["state_dict"]["net.layers.0.weight"], best["state_dict"]["net.layers.0.weight"])


@pytest.mark.slow
def test_checkpoints_are_plain_verified_and_load_as_a_model(boltlab):
    assert boltlab("train", *QUICK, "scheduler.warmup_epochs=1", "optimizer=sgd")[0] == 0
    folder = only_run()
    for name in ("best", "last"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        assert checkpoint_file.verify(path) is None
        content = torch.load(path, weights_only=True)
        assert content["config"]["data"]["num_classes"] == 10
        assert not any("_orig_mod" in key for key in content["state_dict"])
    model = load_model(folder)
    assert not model.training and model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert torch.equal(model.net.state_dict()["layers.0.weight"], best_weights(folder)["net.layers.0.weight"])


def load_model(folder):
    return boltlab.load(folder)


def best_weights(folder):
    return checkpoint_file.read(folder / "checkpoints" / "best.ckpt")["state_dict"]


@pytest.mark.slow
def test_two_runs_are_equal_to_the_bit_and_another_seed_is_not(boltlab):
    for seed in ("1", "1", "2"):
        assert boltlab("train", *QUICK, f"seed={seed}", "test=false", "augment.degrees=10")[0] == 0
    other, again, first = (best_weights(folder) for folder in runs.folders("logs"))
    key = "net.layers.0.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


def test_without_a_test_no_test_metric_appears(boltlab):
    code, out, _ = boltlab("train", *QUICK, "test=false")
    assert code == 0 and "test_acc" not in out and runs.read_summary(only_run())["test"] == {}


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(boltlab):
    code, _, err = boltlab("train", *QUICK, "optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant")
    assert code == 1 and "step" in err and "Traceback" not in err
    folder = only_run()
    assert runs.read_summary(folder)["status"] == "failed"
    for path in (folder / "checkpoints").glob("*.ckpt"):
        weights = checkpoint_file.read(path)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values())


def test_regression_on_a_table(boltlab):
    code, out, _ = boltlab("train", "data=diabetes", "model=mlp_regressor", "trainer.max_epochs=1", "logger=csv")
    assert code == 0 and "test_r2" in out and "test_acc" not in out
    assert set(runs.read_summary(only_run())["best"]) == {"val_mse"}


@pytest.mark.parametrize("kind", ["image_folder", "csv"])
def test_data_with_one_class_are_trained_and_measured(boltlab, kind):
    folder = Path("found")
    folder.mkdir()
    if kind == "csv":
        (folder / "t.csv").write_text("a,b,kind\n" + "".join(f"{i % 7},{i % 3},x\n" for i in range(60)))
        given, tested = ("data.path=found/t.csv", "data.target=kind", "data.task=classification"), 60 * 0.2
    else:
        for index in range(10):
            (folder / "cat").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (25 * index, 0, 0)).save(folder / "cat" / f"{index}.png")
        given, tested = ("data.root=found", "data.input_shape=[3,8,8]", "augment=none"), 10 * 0.1
    code, out, err = boltlab("train", f"data={kind}", *QUICK, *given, "data.num_workers=0")
    assert code == 0 and "one class only" in out.split("epoch 1")[0], err
    counts = (only_run() / "confusion_matrix.csv").read_text().splitlines()[1]
    assert counts == f"{'x' if kind == 'csv' else 'cat'},{tested:.0f}"
    assert boltlab("eval", "run=latest")[0] == 0


def test_what_the_class_refuses_is_a_mistake_of_its_key(boltlab):
    code, _, err = boltlab("train", *QUICK, "model=mlp", "model.net.dropout=2.0")
    assert code == 2 and "model.net" in err and "between 0 and 1" in err
    assert not list(Path("logs/train").iterdir())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_share_of_the_batches_that_is_none_is_named_and_leaves_no_folder(boltlab, split):
    share = f"trainer.limit_{split}_batches=0.2"
    code, _, err = boltlab("train", *QUICK, "data.batch_size=400", "data.val_fraction=0.4", share)
    assert code == 1 and f"Try at least `limit_{split}_batches=" in err and "Traceback" not in err
    assert not list(Path("logs/train").iterdir())


def test_a_missing_data_set_is_a_short_message(boltlab, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    code, _, err = boltlab("train", "data=mnist", "logger=csv")
    assert code == 1 and "data=digits" in err and len(err.splitlines()) < 10 and "Traceback" not in err


def test_what_its_parent_has_just_queued_begins_with_the_same_config_and_no_second_check(tmp_path, monkeypatch):
    begun, checks, real = [], [], train.edit
    monkeypatch.setattr(train, "edit", lambda *arguments: checks.append(len(begun)) or real(*arguments))
    monkeypatch.setattr(train, "_execute", lambda folder, _: begun.append((folder / "config.yaml").read_text()))
    for number, parent in enumerate((os.getpid(), 1)):
        monkeypatch.setattr("boltlab.ground.started_by.parent", parent)
        job = compose("train", ["model=lenet", "data.batch_size=16", "logger=csv"])
        launched.queue(job, tmp_path / str(number), "x")
        assert runs.load_config(tmp_path / str(number)).precision == "auto"
        train.resume_run(tmp_path / str(number), [], own=True)
        assert runs.read_summary(tmp_path / str(number))["status"] == "running"
    assert begun[0] == begun[1] and not any("auto" in f"{yaml.safe_load(begun[0])[key]}" for key in machine.KEYS)
    assert checks == [1]


READS = """
import boltlab.commands.train as command
read = []
sys.addaudithook(lambda event, a: event == "open" and str(a[1] or "").startswith("r") and read.append(str(a[0])))
def counted(overrides, original=command.main):
    code = original(overrides)
    for name in ("config.yaml", "summary.json"):
        print(name, sum(path.endswith("/" + name) for path in read))
    return code
command.main = counted
"""


def test_a_resume_opens_config_and_summary_once(warm, tmp_path):
    assert warm("train", *QUICK, "trainer.max_epochs=1").wait().code == 0
    (folder,) = runs.folders(tmp_path / "logs")
    child = warm("train", f"resume={folder}", "trainer.max_epochs=2", before=READS).wait()
    assert child.code == 0, child.stderr
    assert "config.yaml 1\n" in child.stdout and "summary.json 1\n" in child.stdout, child.stdout


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_says_so_in_the_summary(tmp_path):
    command = [sys.executable, "-m", "boltlab", "train", "trainer.max_epochs=100000", "logger=csv"]
    traces = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=traces,
        # What a shell starts in the background ignores Ctrl-C, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until(lambda: list(Path("logs").rglob("last.ckpt")), process)
        assert runs.status(runs.read_summary(only_run())) == "running"
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # says where every thread stands
            out, _ = process.communicate(timeout=HANG)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert runs.status(runs.read_summary(only_run())) == "interrupted"
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_command_that_its_launcher_starts_again_finds_the_run_that_it_had_begun(boltlab, monkeypatch):
    """Slurm starts a whole job file from its beginning: what it had finished is not trained again."""
    monkeypatch.setattr("boltlab.ground.started_by.start", lambda: ("slurm 17", 0))
    for seed in "12":
        assert boltlab("train", *QUICK, f"seed={seed}", "trainer.max_epochs=1")[0] == 0
    monkeypatch.setattr("boltlab.ground.started_by.start", lambda: ("slurm 17", 1))
    code, out, _ = boltlab("train", *QUICK, "seed=1", "trainer.max_epochs=1")
    first, second = sorted(runs.folders("logs"), key=lambda folder: runs.load_config(folder).seed)
    assert code == 0 and out == f"{runs.shown(first)} was finished before this command was started again\n"
    runs.write_summary(second, status="interrupted")
    code, _, err = boltlab("train", *QUICK, "seed=2", "trainer.max_epochs=1")
    assert code == 0 and len(list(runs.folders("logs"))) == 2, err
    assert len(runs.read_summary(second)["resumed"]) == 1
    monkeypatch.setattr("boltlab.ground.started_by.start", lambda: ("slurm 18", 1))
    assert boltlab("train", *QUICK, "seed=1", "trainer.max_epochs=1")[0] == 0
    assert len(list(runs.folders("logs"))) == 3  # another job's runs are none of its own


@pytest.mark.slow
def test_two_processes_share_one_run_folder_and_one_wandb_run(boltlab_process):
    more = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=[csv,wandb]")
    done = boltlab_process("train", "model=linear", "trainer.max_epochs=1", *more)
    assert done.returncode == 0, done.stderr
    folder = only_run()
    assert runs.read_summary(folder)["status"] == "finished"
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    with (folder / "metrics.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row.get("val_acc")]) == 1


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all_of_them_at_once_with_its_message(boltlab_process):
    more = ("trainer.devices=2", "trainer.accelerator=cpu", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant")
    done = boltlab_process("train", *QUICK, *more)
    assert done.returncode == 1
    assert "loss is nan" in done.stderr.splitlines()[-1]
    assert done.stdout.count(str(only_run())) == 1  # trained once, not restarted
    assert "loss is nan" in runs.read_summary(only_run())["reason"]
