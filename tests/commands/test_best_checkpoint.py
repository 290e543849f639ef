"""The checkpoint that is called the best is the one that is used, whatever its file is called; where none was chosen,
the last weights are, and the run says so."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from warm import only_run

import boltlab as public
from boltlab import runs
from boltlab.checkpoints.file import CheckpointError
from project.models.classifier import Classifier

pytestmark = pytest.mark.slow

# The last epoch is not validated, so that its weights are not the best.
QUICK = (
    *("logger=csv", "trainer.accelerator=cpu", "data.max_samples=300", "data.input_shape=[1,8,8]", "model=mlp"),
    *("~callbacks.summary", "trainer.max_epochs=5", "trainer.check_val_every_n_epoch=2"),
)
TOP_3 = ("callbacks.best.save_top_k=3", "callbacks.best.filename='best-{epoch}'")


def own_checkpoint(self):
    return [ModelCheckpoint(monitor="val_loss", mode="min", filename="mine-{epoch}", save_top_k=-1)]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]["net.layers.0.weight"]


def column(folder, name):
    with (folder / "metrics.csv").open() as file:
        return {int(row["epoch"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def one_row(boltlab, *arguments):
    code, out, err = boltlab("predict", *arguments, "input=digit.png", "top_k=10")
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    ("given", "metric", "pick", "name"),
    [
        (TOP_3, "val_acc", np.argmax, "best-{}.ckpt"),
        ((*TOP_3, "+callbacks.best.save_last=true"), "val_acc", np.argmax, "best-{}.ckpt"),
        (("callbacks.best.filename=chosen",), "val_acc", np.argmax, "chosen.ckpt"),
        (("callbacks.best.filename=w", "callbacks.best.save_weights_only=true"), "val_acc", np.argmax, "w.ckpt"),
        ((), "val_loss", np.argmin, "mine-epoch={}.ckpt"),
    ],
    ids=["top 3", "and Lightning's last", "another name", "weights only", "the module's own"],
)
def test_the_file_that_modelcheckpoint_names_is_used_everywhere(given, metric, pick, name, boltlab, monkeypatch):
    if not given:
        monkeypatch.setattr(Classifier, "configure_callbacks", own_checkpoint)
    code, out, err = boltlab("train", *QUICK, *given)
    assert code == 0, err
    folder, measured = only_run(), column(only_run(), metric)
    epoch = list(measured)[pick(list(measured.values()))]
    path = folder / "checkpoints" / name.format(epoch)
    summary = runs.read_summary(folder)
    assert summary["best_checkpoint"] == f"checkpoints/{path.name}" and summary["tested"] == "best"
    assert summary["best"] == {metric: pytest.approx(measured[epoch])}
    assert f"best checkpoint ({metric} {measured[epoch]:.4f})" in out

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save("digit.png")
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0 and runs.read_summary(next(runs.folders("logs", "eval")))["test"] == summary["test"], err
    predicted = one_row(boltlab, "run=latest")

    # As it was killed: what is known stands in its checkpoints alone.
    if "save_weights_only=true" not in " ".join(given):
        runs.write_summary(folder, status="interrupted", best_checkpoint="checkpoints/no.ckpt")
    last = weights(folder / "checkpoints" / "last.ckpt")
    assert torch.equal(public.load(folder).state_dict()["net.layers.0.weight"], weights(path))
    assert torch.equal(public.load(folder, "best").state_dict()["net.layers.0.weight"], weights(path))
    assert torch.equal(public.load(folder, "last").state_dict()["net.layers.0.weight"], last)
    assert not torch.equal(last, weights(path))
    assert one_row(boltlab, "run=latest") == predicted != one_row(boltlab, "run=latest", "checkpoint=last")
    code, _, err = boltlab("train", *QUICK, f"init_from={folder.name}", "name=second", "test=false")
    assert code == 0, err
    assert runs.read_summary(next(runs.folders("logs")))["init_from"]["path"] == str(path.resolve())


NONE = {
    "nothing is kept": ("callbacks.best.save_top_k=0",),
    "no batch is validated": ("trainer.limit_val_batches=0",),
    "ended before": ("trainer.max_steps=7",),
    "never due": ("trainer.check_val_every_n_epoch=9",),
}
WITH = {
    "alone": (),
    "early stopping": ("callbacks=[default,early_stopping]",),
    "plateau": ("scheduler=plateau",),
    "ema": ("callbacks=[default,ema]",),
}


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor='val_acc'.. could not find the monitored key")
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_acc which is not available")
@pytest.mark.parametrize("more", WITH)
@pytest.mark.parametrize("missing", NONE)
def test_without_a_best_one_the_last_weights_are_tested(missing, more, boltlab):
    length = ("trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1", "data.batch_size=20")
    code, out, err = boltlab("train", *WITH[more], *QUICK, *length, *NONE[missing])
    assert code == 0 and "test split, last weights: no best checkpoint was chosen" in out, err
    folder = only_run()
    summary = runs.read_summary(folder)
    assert summary["tested"] == "last" and "best" not in summary and "best_checkpoint" not in summary

    for verb in (["eval"], ["predict", f"input={folder}"]):
        Image.new("L", (8, 8)).save(folder / "a.png")
        code, _, err = boltlab(*verb, "run=latest", "checkpoint=best")
        assert code == 1 and "has no best checkpoint: checkpoint=last takes" in err
        code, _, err = boltlab(*verb, "run=latest")
        assert code == 0 and "has no best checkpoint: its last one is used" in err
    assert runs.read_summary(next(runs.folders("logs", "eval")))["test"] == summary["test"]
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        public.load(folder, "best")
    assert torch.equal(public.load(folder).net.layers[0].weight, weights(folder / "checkpoints" / "last.ckpt"))
    code, _, err = boltlab("train", *QUICK, "init_from=latest", "trainer.max_steps=1", "test=false")
    assert code == 0 and "its last one is used" in err


def test_without_any_file_the_weights_in_memory_are_tested(boltlab):
    given = [text for text in QUICK if text != "~callbacks.summary"]
    code, _, err = boltlab("train", *given, "callbacks=[best]", "callbacks.best.save_top_k=0")
    assert code == 0 and runs.read_summary(only_run())["tested"] == "last", err
    assert not list(only_run().rglob("*.ckpt"))
    code, _, err = boltlab("eval", "run=latest")
    assert code == 1 and "has no checkpoint" in err


def test_a_grid_without_a_best_checkpoint_finishes(boltlab):
    code, out, err = boltlab("train", "-m", *QUICK, "seed=1,2", "trainer.limit_val_batches=0", "trainer.max_epochs=1")
    assert code == 0 and out.count("finished") == 2, err
    (path,) = Path("logs", "train").glob("*/jobs.json")
    jobs = json.loads(path.read_text())["jobs"]
    assert [(job["status"], job["best"]) for job in jobs] == [("finished", None)] * 2


def test_a_sweep_whose_trials_measure_nothing_says_so_and_trains_each_once(boltlab_process):
    ended = boltlab_process(
        *("sweep", *QUICK, "optimizer.lr=choice(0.01,0.02)", "trainer.limit_val_batches=0", "trainer.max_epochs=1"),
        "sampler=grid",
    )
    assert ended.returncode == 1
    assert ended.stdout.count("the run has no val_acc: was nothing validated?") == 2, ended.stdout
    assert "tried again" not in ended.stdout
