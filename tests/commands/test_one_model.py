"""The weights that are validated are those that are saved, tested, evaluated, exported and loaded: to the bit."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from warm import FORKED, only_run

import boltlab as public
from boltlab import runs
from boltlab.config.build import build

QUICK = (
    *("logger=csv", "trainer.accelerator=cpu", "data.max_samples=400", "data.input_shape=[1,8,8]", "optimizer.lr=0.02"),
    *("model=mlp", "model.net.hidden_sizes=[16]", "callbacks.last.keep_last=9", "~callbacks.summary"),
)
LIGHTNING = "lightning.pytorch.callbacks"
EMA = ("callbacks=[default,ema]", "callbacks.ema.decay=0.95")
LIGHTNING_EMA = (f"+callbacks.a._target_={LIGHTNING}.EMAWeightAveraging", "+callbacks.a.decay=0.95")
SWA = (
    f"+callbacks.a._target_={LIGHTNING}.StochasticWeightAveraging",
    *("+callbacks.a.swa_lrs=0.02", "+callbacks.a.swa_epoch_start=2"),
)
AVERAGES = {"ema": EMA, "lightning's ema": LIGHTNING_EMA, "swa": SWA}
pytestmark = [
    pytest.mark.slow,
    # The averages of Lightning find a schedule that steps by batches, and a hook that only FSDP uses.
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]


def arrays(state):
    return {name.removeprefix("net."): value.double().numpy() for name, value in state.items() if name[:4] == "net."}


def read(path):
    return torch.load(path, weights_only=True)


def by_numpy(weights, folder, split):
    """Accuracy and mean cross entropy of a perceptron with one hidden layer, in float64."""
    data = build(runs.load_config(folder, own=True), "data")
    right, losses = [], []
    for images, labels in data.dataloader(split):
        x, labels = data.normalize(images).double().numpy().reshape(len(labels), -1), labels.numpy()
        hidden = np.maximum(x @ weights["layers.0.weight"].T + weights["layers.0.bias"], 0)
        (last,) = {name.rpartition(".")[0] for name in weights} - {"layers.0"}
        logits = hidden @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
        right += list(logits.argmax(1) == labels)
        losses += list(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])
    return np.mean(right), np.mean(losses)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("chosen", AVERAGES)
def test_one_model_is_saved_tested_evaluated_exported_and_loaded(chosen, boltlab):
    code, _, err = boltlab("train", *QUICK, *AVERAGES[chosen], "trainer.max_epochs=4")
    assert code == 0, err
    folder = only_run()
    summary, saved = runs.read_summary(folder), read(folder / "checkpoints" / "best.ckpt")["state_dict"]

    accuracy, loss = by_numpy(arrays(saved), folder, "test")
    assert summary["test"]["test_acc"] == pytest.approx(accuracy, abs=1e-7)
    assert summary["test"]["test_loss"] == pytest.approx(loss, rel=1e-5)
    accuracy, _ = by_numpy(arrays(saved), folder, "val")
    assert summary["best"]["val_acc"] == pytest.approx(accuracy, abs=1e-7)

    code, _, err = boltlab("eval", "run=latest")
    assert code == 0, err
    evaluation = next(runs.folders("logs", "eval"))
    assert runs.read_summary(evaluation)["test"] == summary["test"]
    assert (evaluation / "confusion_matrix.csv").read_text() == (folder / "confusion_matrix.csv").read_text()
    code, _, err = boltlab("checkpoint", "export", "latest", "output=net.safetensors")
    assert code == 0, err
    model = public.load(folder)
    for name, value in load_file("net.safetensors").items():
        assert np.array_equal(value, saved[f"net.{name}"].numpy())
        assert np.array_equal(value, model.state_dict()[f"net.{name}"].numpy())


@pytest.mark.parametrize("chosen", ["ema", "lightning's ema"])
def test_an_exponential_average_is_that_of_the_weights_after_each_step(chosen, boltlab):
    one_step_an_epoch = ("trainer.limit_train_batches=1", "trainer.max_epochs=6")
    code, _, err = boltlab("train", *QUICK, *AVERAGES[chosen], *one_step_an_epoch)
    assert code == 0, err
    kept = [read(only_run() / "checkpoints" / f"last{n}.ckpt") for n in ("-5", "-4", "-3", "-2", "-1", "")]
    expected = None
    for content in kept:
        now = arrays(content["current_model_state"])
        expected = {k: 0.95 * (expected or now)[k] + 0.05 * v for k, v in now.items()}
        for name, value in arrays(content["state_dict"]).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-6)


def test_the_average_of_swa_is_the_mean_of_the_epochs(boltlab):
    code, out, err = boltlab("train", *QUICK, *SWA, "trainer.max_epochs=5")
    assert code == 0 and "StochasticWeightAveraging replaced the weights" in out, err
    folder = only_run()
    # It takes the weights at the start of the second epoch (swa_epoch_start=2, from 1) and of each later one.
    kept = [arrays(read(folder / "checkpoints" / f"last-{n}.ckpt")["state_dict"]) for n in (4, 3, 2, 1)]
    for name in ("best", "last"):
        for key, value in arrays(read(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]).items():
            np.testing.assert_allclose(value, np.mean([weights[key] for weights in kept], axis=0), atol=1e-6)
    loss = by_numpy(arrays(read(folder / "checkpoints" / "best.ckpt")["state_dict"]), folder, "val")[1]
    assert float(rows(folder)[-1]["val_loss"]) == pytest.approx(loss, rel=1e-5)


def test_swa_of_a_net_with_batch_norm(boltlab):
    code, out, err = boltlab(
        "train", *QUICK, *SWA, "model.net.batch_norm=true", "trainer.max_epochs=3", "scheduler=constant"
    )
    assert code == 0 and "StochasticWeightAveraging replaced the weights" in out, err
    summary = runs.read_summary(only_run())
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0 and runs.read_summary(next(runs.folders("logs", "eval")))["test"] == summary["test"], err
    best, last = (read(only_run() / "checkpoints" / f"{name}.ckpt")["state_dict"] for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best if name.startswith("net."))


def test_a_run_that_swa_has_ended_continues_from_the_weights_that_were_trained(boltlab):
    """As a run that was trained to that length at once; the schedule of SWA reaches beyond the first length."""
    chosen = (*QUICK, "scheduler=constant")
    for epochs, name in ((4, "short"), (3, "long")):
        code, _, err = boltlab("train", *chosen, *SWA, f"trainer.max_epochs={epochs}", f"name={name}")
        assert code == 0, err
    code, _, err = boltlab("train", "resume=long", "trainer.max_epochs=4")
    assert code == 0, err
    one, other = (next(f for f in runs.folders("logs") if f"_{name}-" in f.name) for name in ("short", "long"))
    for key in ("state_dict", "current_model_state"):
        one_state, other_state = (arrays(read(f / "checkpoints" / "last.ckpt")[key]) for f in (one, other))
        assert all(np.array_equal(one_state[name], other_state[name]) for name in one_state), key


@pytest.mark.parametrize("chosen", ["ema", "swa"])
def test_on_two_processes(chosen, warm):
    child = warm(
        *("train", *QUICK, *AVERAGES[chosen], "trainer.max_epochs=4", "trainer.devices=2", "trainer=ddp"),
        before=FORKED,
    ).wait()
    assert child.code == 0, child.stderr
    folder = only_run()
    summary = runs.read_summary(folder)
    saved = arrays(read(folder / "checkpoints" / "best.ckpt")["state_dict"])
    accuracy, loss = by_numpy(saved, folder, "test")
    assert summary["test"]["test_acc"] == pytest.approx(accuracy, abs=1e-7)
    assert summary["test"]["test_loss"] == pytest.approx(loss, rel=1e-5)
    for devices in (1, 2):
        child = warm("eval", "run=latest", f"trainer.devices={devices}", before=FORKED).wait()
        assert child.code == 0, child.stderr
        found = runs.read_summary(next(runs.folders("logs", "eval")))["test"]
        if devices == 2:
            assert found == summary["test"]
        assert found == pytest.approx(summary["test"], rel=1e-6)


def test_the_pictures_of_mistakes_and_calibration_are_of_the_same_model(boltlab):
    code, _, err = boltlab("train", *QUICK, *EMA, "trainer.max_epochs=2")
    assert code == 0, err
    folder = only_run()
    calibration = json.loads((folder / "calibration.json").read_text())
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0, err
    assert json.loads((next(runs.folders("logs", "eval")) / "calibration.json").read_text()) == calibration
