"""The average is what the formula says, is what is validated and saved, and is resumed to the bit."""

import csv
from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from boltlab import load, runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.training.trainer import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("logger=csv", "trainer.accelerator=cpu", "data.batch_size=400", "model=lenet_bn", "optimizer.lr=0.05")
EVERY = ("callbacks.last.keep_last=3",)


class Broken(Exception):
    """Ends a validation."""


class Steps(Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, model, *arguments):
        self.kept.append({key: value.detach().clone() for key, value in model.net.state_dict().items()})


def fit(folder, *overrides, epochs=2, ckpt_path=None, broken_in=None):
    """The last checkpoint's content, and the weights after each step."""
    config = compose("train", [*QUICK, "test=false", f"trainer.max_epochs={epochs}", *overrides]).config
    config.run_dir = str(folder)
    torch.manual_seed(0)
    data, model, steps = build(config, "data"), build(config, "model"), Steps()
    trainer = make_trainer(config)
    trainer.callbacks.insert(0, steps)
    if broken_in is not None:
        own = model.validation_step

        def broken(batch, batch_idx):
            if not trainer.sanity_checking and trainer.current_epoch == broken_in:
                raise Broken
            return own(batch, batch_idx)

        model.validation_step = broken
    with suppress(Broken):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return checkpoint_file.read(newest), steps.kept


def net(state):
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_that_of_the_formula_and_the_training_knows_nothing_of_it(tmp_path, every):
    chosen = ("callbacks=[last,ema]", "callbacks.ema.decay=0.8", f"callbacks.ema.update_every_n_steps={every}")
    found, kept = fit(tmp_path / "with", *chosen)
    first, *later = kept[every - 1 :: every]
    average = net(found["state_dict"])
    for key in (key for key, value in average.items() if value.is_floating_point()):
        expected = first[key]
        for weights in later:
            expected = 0.8 * expected + 0.2 * weights[key]
        torch.testing.assert_close(average[key], expected)
    assert not torch.equal(average["features.0.weight"], kept[-1]["features.0.weight"])
    without, alone = fit(tmp_path / "without", "callbacks=[last]")
    assert all(same(*pair) for pair in zip(kept, alone, strict=True))
    assert same(net(found["current_model_state"]), net(without["state_dict"]))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64", "bf16-mixed"])
def test_the_average_keeps_more_than_the_bits_of_the_weights(tmp_path, precision):
    """It moves by less than a weight of 16 bits can; validation, which sees it rounded, leaves it as it is."""
    chosen = ("callbacks=[last,ema]", "callbacks.ema.decay=0.999", *EVERY, f"precision={precision}")
    chosen += ("model=mlp", "optimizer=sgd")
    found, kept = fit(tmp_path / "whole", *chosen, epochs=3)
    average, dtype = net(found["state_dict"]), {"64": torch.float64}.get(precision, torch.float32)
    for key in (key for key, value in average.items() if value.is_floating_point()):
        expected = kept[0][key].double()
        for weights in kept[1:]:
            expected = 0.999 * expected + 0.001 * weights[key].double()
        assert average[key].dtype == dtype
        torch.testing.assert_close(average[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(average["layers.0.weight"], kept[0]["layers.0.weight"].to(dtype))
    first = tmp_path / "whole" / "checkpoints" / "last-2.ckpt"
    resumed, _ = fit(tmp_path / "resumed", *chosen, epochs=3, ckpt_path=str(first))
    assert same(found["state_dict"], resumed["state_dict"])
    assert same(found["current_model_state"], resumed["current_model_state"])


def test_buffers_are_those_of_the_weights_where_they_are_not_averaged(tmp_path):
    found, kept = fit(tmp_path, "callbacks=[last,ema]", "callbacks.ema.use_buffers=false")
    average = net(found["state_dict"])
    buffers = [key for key in average if "running" in key or "num_batches" in key]
    assert buffers and all(torch.equal(average[key], kept[-1][key]) for key in buffers)
    assert not torch.equal(average["features.0.weight"], kept[-1]["features.0.weight"])


def test_the_average_is_validated_saved_and_loaded(boltlab):
    code, _, err = boltlab(
        "train", *QUICK, "callbacks=[best,last,ema]", "trainer.max_epochs=3", "callbacks.ema.decay=0.8"
    )
    assert code == 0, err
    folder = next(iter(runs.folders("logs")))
    content = checkpoint_file.read(folder / "checkpoints" / "last.ckpt")
    model = load(folder, "last")
    assert all(torch.equal(p, content["state_dict"][f"net.{name}"]) for name, p in model.net.named_parameters())
    with (folder / "metrics.csv").open() as file:
        logged = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    code, _, err = boltlab("eval", "run=latest", "split=val", "checkpoint=last", "callbacks=none")
    assert code == 0, err
    assert runs.read_summary(next(iter(runs.folders("logs", "eval"))))["test"]["val_loss"] == pytest.approx(logged[-1])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_it_is_the_same_to_the_bit(tmp_path):
    chosen = ("callbacks=[last,ema]", "callbacks.ema.decay=0.8", "callbacks.ema.update_every_n_steps=3", *EVERY)
    whole, _ = fit(tmp_path / "whole", *chosen, epochs=3)
    first = tmp_path / "whole" / "checkpoints" / "last-2.ckpt"
    resumed, _ = fit(tmp_path / "resumed", *chosen, epochs=3, ckpt_path=str(first))
    assert whole["global_step"] == resumed["global_step"] == 12
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert same(whole[part], resumed[part]), part
    assert not same(net(whole["state_dict"]), net(whole["current_model_state"]))


def test_until_it_starts_the_average_is_the_weights(tmp_path):
    chosen = ("callbacks=[last,ema]", "callbacks.ema.start_step=100", "trainer.max_steps=6")
    found, kept = fit(tmp_path, *chosen)  # 4 steps an epoch: it ends in the middle of the second
    assert found["global_step"] == 6
    assert same(net(found["state_dict"]), kept[5]) and same(net(found["current_model_state"]), kept[5])


def test_a_validation_that_breaks_off_leaves_the_weights_in_their_place(tmp_path):
    chosen = ("callbacks=[last,best,ema]", "+callbacks.best.save_on_exception=true")
    found, kept = fit(tmp_path, *chosen, broken_in=1)
    assert found["global_step"] == len(kept) == 8
    assert same(net(found["current_model_state"]), kept[-1]) and not same(net(found["state_dict"]), kept[-1])
