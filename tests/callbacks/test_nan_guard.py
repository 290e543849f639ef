import json
import math
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from boltlab import runs
from boltlab.callbacks.nan_guard import NaNGuard, NonFiniteLoss
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.ground.errors import UserError
from boltlab.training.trainer import make_trainer as make_train_trainer

pytestmark = [pytest.mark.slow, pytest.mark.floats, pytest.mark.filterwarnings("ignore:Checkpoint directory")]


def breaking(tiny_module, at_step: int, value: float):
    """A module whose loss is `value` at one step, counted from 0."""

    class Breaking(tiny_module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * value if self.global_step == at_step else loss

    return Breaking()


def checkpoint_is_finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_at_the_step_whose_loss_is_not_finite(make_trainer, tiny_module, tiny_data, run_dir, value):
    trainer = make_trainer("logger=none", "callbacks=[nan_guard,best,last]")
    module = breaking(tiny_module, at_step=6, value=value)
    with pytest.raises(UserError, match=rf"loss is {value} at step 7 \(epoch 1, batch 2,.*\(step 4 is the"):
        trainer.fit(module, datamodule=tiny_data())
    assert trainer.global_step == 6  # the step is not taken
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    for name in ("best", "last"):
        assert checkpoint_is_finite(run_dir / "checkpoints" / f"{name}.ckpt")
        assert torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("every_n_steps", [3, 1000])
def test_losses_looked_at_together_are_still_seen_before_anything_is_saved(
    make_trainer, tiny_module, tiny_data, run_dir, every_n_steps
):
    class AsOnAccelerator(NaNGuard):
        @staticmethod
        def _reads_freely(trainer):
            return False

    trainer = make_trainer(callbacks=[AsOnAccelerator(every_n_steps)])
    trainer.callbacks.append(ModelCheckpoint(run_dir / "checkpoints", "last"))
    with pytest.raises(NonFiniteLoss, match=r"nan at step 2 \(epoch 0, batch 1"):
        trainer.fit(breaking(tiny_module, at_step=1, value=math.nan), datamodule=tiny_data())
    assert trainer.global_step == min(every_n_steps, 4)
    assert not (run_dir / "checkpoints").exists()


def test_weights_that_a_finite_loss_has_broken_are_not_saved(make_trainer, tiny_module, tiny_data, run_dir):
    class BadGradient(tiny_module):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 7:  # the last step of the second epoch: no later loss shows it
                self.net[-1].bias.grad.fill_(math.inf)

    trainer = make_trainer("logger=none", "callbacks=[nan_guard,last]", "trainer.limit_val_batches=0")
    with pytest.raises(NonFiniteLoss, match="weights are not finite after step 8"):
        trainer.fit(BadGradient(), datamodule=tiny_data())
    assert checkpoint_is_finite(run_dir / "checkpoints" / "last.ckpt")


def test_the_checkpoint_of_an_exception_is_not_made_of_a_broken_model(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer("logger=none", "callbacks=[nan_guard,last,best]", "+callbacks.best.save_on_exception=true")
    with pytest.raises(NonFiniteLoss):
        trainer.fit(breaking(tiny_module, at_step=6, value=math.nan), datamodule=tiny_data())
    assert checkpoint_is_finite(run_dir / "checkpoints" / "last.ckpt")


def test_a_healthy_run_is_left_alone(make_trainer, tiny_module, tiny_data):
    torch.manual_seed(0)
    guarded, plain = tiny_module(), tiny_module()
    plain.load_state_dict(guarded.state_dict())
    for module, callbacks in ((guarded, [NaNGuard()]), (plain, [])):
        torch.manual_seed(1)
        make_trainer(callbacks=callbacks).fit(module, datamodule=tiny_data())
    for one, other in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


# -- with boltlab's own data and models

QUICK = ("logger=csv", "callbacks=[nan_guard,last]", "test=false", "trainer=cpu", "data.batch_size=100")
QUICK += ("trainer.enable_progress_bar=false", "trainer.max_epochs=1")


def digits(folder, *overrides):
    """(trainer, model, data) of a run on digits: 13 batches an epoch."""
    config = compose("train", [*QUICK, *overrides]).config
    config.run_dir = str(folder)
    return make_train_trainer(config), build(config, "model"), build(config, "data")


def break_criterion(monkeypatch, model, batches, how=lambda loss, output: loss * math.nan):
    """The loss of these batches is no longer finite, or its gradient."""
    criterion, calls = model.criterion, iter(range(1000))

    def broken(output, target):
        loss, weight = criterion(output, target)
        return (how(loss, output) if model.training and next(calls) in batches else loss), weight

    monkeypatch.setattr(model, "criterion", broken)


def bad_gradient(loss, output):
    return loss + (output * 0).abs().sqrt().sum() * 0  # finite, and its slope is 0 x inf


def test_what_is_kept_is_the_state_before_and_the_samples(run_dir, monkeypatch):
    trainer, model, data = digits(run_dir, "augment=basic", "optimizer=adam", "trainer.accumulate_grad_batches=2")
    break_criterion(monkeypatch, model, [5])
    seen, weights = [], []
    monkeypatch.setattr(
        model, "on_train_batch_start", lambda batch, index: seen.append(batch[1].clone()), raising=False
    )
    monkeypatch.setattr(
        model, "on_before_zero_grad", lambda _: weights.append([p.clone() for p in model.parameters()]), raising=False
    )
    with pytest.raises(
        NonFiniteLoss, match=r"nan at step 3 \(epoch 0, batch 5, both from 0\), samples \d+, .* 92 more of"
    ):
        trainer.fit(model, datamodule=data)
    (record,) = json.loads((run_dir / "nan" / "samples.json").read_text())
    assert (record["step"], record["epoch"], record["batches"], record["files"]) == (3, 0, [5], None)
    labels = data.dataset("train").labels
    assert labels[record["indices"]].tolist() == seen[5].tolist() and len(seen) == 6
    batch = torch.load(run_dir / "nan" / "batch.pt", weights_only=True)
    assert torch.equal(batch["x"], data.samples("train", record["indices"], augment=True)[0])
    assert torch.equal(batch["y"], seen[5])
    state = checkpoint_file.read(run_dir / "nan" / "state.ckpt")
    for name, before in zip([name for name, _ in model.named_parameters()], weights[2], strict=True):
        assert torch.equal(state["state_dict"][name], before)
    assert {float(s["step"]) for s in state["optimizer_states"][0]["state"].values()} == {2}


def test_a_bad_sample_of_a_folder_is_named_by_its_file(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "photos" / name / f"{i} =,é.png")
    folder = [f"data.root={tmp_path}/photos", "data.input_shape=[3,8,8]", "data.batch_size=4", "augment=none"]
    trainer, model, data = digits(tmp_path / "run", "data=image_folder", *folder, "model=linear", "monitor=val_loss")
    break_criterion(monkeypatch, model, [2])
    with pytest.raises(NonFiniteLoss) as error:
        trainer.fit(model, datamodule=data)
    (record,) = json.loads((tmp_path / "run" / "nan" / "samples.json").read_text(encoding="utf-8"))
    assert len(record["files"]) == 4 and all(Path(file).is_file() for file in record["files"])
    assert ", ".join(record["files"][:3]) in str(error.value) and "and 1 more" in str(error.value)
    x = torch.load(tmp_path / "run" / "nan" / "batch.pt", weights_only=True)["x"]
    assert [int(image[0, 0, 0]) for image in x] == [int(Path(file).name.split()[0]) for file in record["files"]]


HOW = {"loss": (lambda loss, output: loss * math.nan, "loss is nan"), "gradient": (bad_gradient, "a gradient is not")}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("recipe", "accumulated"),
    [(["optimizer=sgd"], 1), (["optimizer=adamw", "trainer.gradient_clip_val=0.5"], 1), (["optimizer=muon"], 3)],
)
def test_a_skipped_step_leaves_nothing_behind(run_dir, monkeypatch, how, recipe, accumulated):
    recipe = [*recipe, f"trainer.accumulate_grad_batches={accumulated}", "callbacks.nan_guard.skip_steps=1"]
    broken = 7  # of the 3rd step where three batches make one
    skipped_batches = [broken] if accumulated == 1 else [6, 7, 8]
    torch.manual_seed(0)
    trainer, model, data = digits(run_dir, *recipe)
    torch.manual_seed(0)
    reference_trainer, reference, same_data = digits(run_dir / "reference", *recipe)
    reference.load_state_dict(model.state_dict())
    break_criterion(monkeypatch, model, [broken], HOW[how][0])
    with pytest.warns(UserWarning, match=rf"skipped \(1 of at most 1\).*{HOW[how][1]}.* samples"):
        trainer.fit(model, datamodule=data)

    losses, step_of = [], type(reference).optimizer_step
    criterion = reference.criterion

    def kept(output, target):
        loss, weight = criterion(output, target)
        if reference.training:
            losses.append((loss.detach(), weight))
        return loss, weight

    buffers = {}

    def without_one(self, epoch, batch_idx, optimizer, closure):
        if batch_idx == skipped_batches[-1]:
            closure()
        else:
            step_of(self, epoch, batch_idx, optimizer, closure)

    def keep_buffers(batch, batch_idx):
        if batch_idx == skipped_batches[0]:
            buffers.update((name, b.clone()) for name, b in reference.named_buffers())
        if batch_idx == skipped_batches[-1] + 1:
            for name, b in reference.named_buffers():
                b.copy_(buffers[name])

    monkeypatch.setattr(reference, "criterion", kept)
    monkeypatch.setattr(type(reference), "optimizer_step", without_one)
    monkeypatch.setattr(reference, "on_train_batch_start", keep_buffers, raising=False)
    reference_trainer.fit(reference, datamodule=same_data)

    assert trainer.global_step == reference_trainer.global_step == -(-13 // accumulated)
    for one, other in zip(model.net.state_dict().values(), reference.net.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = trainer.optimizers[0].state_dict(), reference_trainer.optimizers[0].state_dict()
    assert mine["param_groups"] == theirs["param_groups"]  # the schedule went on
    for one, other in zip(mine["state"].values(), theirs["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    counted = [pair for batch, pair in enumerate(losses) if batch not in skipped_batches]
    mean = sum(loss * weight for loss, weight in counted) / sum(weight for _, weight in counted)
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], mean, check_dtype=False)
    last = checkpoint_file.read(run_dir / "checkpoints" / "last.ckpt")
    assert [state for key, state in last["callbacks"].items() if "NaNGuard" in key] == [
        {"skipped": [8 if accumulated == 1 else 3]}
    ]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose
def test_more_bad_steps_than_allowed_end_the_run_also_over_a_resume(run_dir, monkeypatch, capsys):
    skip = ("callbacks.nan_guard.skip_steps=2", "trainer.max_epochs=2")
    trainer, model, data = digits(run_dir, *skip, "trainer.limit_train_batches=5")
    trainer.fit_loop.max_epochs = 1
    break_criterion(monkeypatch, model, [1, 3])
    with pytest.warns(UserWarning, match=r"skipped \([12] of at most 2\)"):
        trainer.fit(model, datamodule=data)
    assert "2 of at most 2 steps were skipped, not finite: 2, 4" in capsys.readouterr().out
    assert [record["step"] for record in json.loads((run_dir / "nan" / "samples.json").read_text())] == [2, 4]
    resumed, model, data = digits(run_dir / "again", *skip, "trainer.limit_train_batches=5")
    break_criterion(monkeypatch, model, [0])
    with pytest.raises(NonFiniteLoss, match=r"more than callbacks.nan_guard.skip_steps=2 .* nan at step 6 \(epoch 1,"):
        resumed.fit(model, datamodule=data, ckpt_path=str(run_dir / "checkpoints" / "last.ckpt"))
    assert resumed.global_step == 5
    kept = checkpoint_file.read(run_dir / "again" / "nan" / "state.ckpt")
    before = checkpoint_file.read(run_dir / "checkpoints" / "last.ckpt")
    assert all(torch.equal(value, before["state_dict"][key]) for key, value in kept["state_dict"].items())


def test_weights_broken_by_an_earlier_gradient_are_told_apart(run_dir, monkeypatch):
    trainer, model, data = digits(run_dir)
    break_criterion(monkeypatch, model, [4], bad_gradient)
    with pytest.raises(NonFiniteLoss, match=r"step 6 .*the weights were not finite before it, an earlier gradient"):
        trainer.fit(model, datamodule=data)


def test_a_folder_that_cannot_be_written_does_not_hide_the_loss(run_dir, monkeypatch):
    run_dir.mkdir()
    (run_dir / "nan").write_text("a file stands here")
    trainer, model, data = digits(run_dir)
    break_criterion(monkeypatch, model, [4])
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 5 .*; not kept: "):
        trainer.fit(model, datamodule=data)


OWN_MODEL = """
import math
from project.models.classifier import Classifier

class Broken(Classifier):
    def criterion(self, output, target):
        loss, weight = super().criterion(output, target)
        bad = self.training and self.global_step in (2, 4) and self.global_rank == 1
        return (loss * math.nan if bad else loss), weight
"""


@pytest.mark.parametrize("skip_steps", [0, 2])
def test_processes_skip_and_stop_together(boltlab_process, tmp_path, skip_steps):
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    overrides = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "model._target_=own_model.Broken"]
    overrides += ["logger=csv", "trainer.max_epochs=1", "data.batch_size=100", "test=false", "monitor=train_loss"]
    overrides += ["mode=min", f"callbacks.nan_guard.skip_steps={skip_steps}"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = boltlab_process("train", *overrides, PYTHONPATH=path)
    (folder,) = runs.folders("logs")
    records = json.loads((folder / "nan" / "samples_rank1.json").read_text())
    assert not (folder / "nan" / "samples_rank0.json").exists()
    if skip_steps:
        assert done.returncode == 0, done.stderr
        assert runs.read_summary(folder)["skipped_steps"] == 2
        assert [record["step"] for record in records] == [3, 5]
        assert "skipped (2 of at most 2): the training loss is nan at step 5" in done.stderr
        assert "2 of at most 2 steps were skipped, not finite: 3, 5" in done.stdout
        assert checkpoint_is_finite(folder / "nan" / "state.ckpt")
        assert checkpoint_is_finite(folder / "checkpoints" / "last.ckpt")
    else:
        assert done.returncode == 1
        assert (
            "boltlab train: the training loss is nan at step 3 (epoch 0, batch 2, both from 0), samples" in done.stderr
        )
        assert "(process 1)" in done.stderr.splitlines()[-1]
    train = build(runs.load_config(folder, own=True), "data").dataset("train").labels
    y = torch.load(folder / "nan" / "batch_rank1.pt", weights_only=True)["y"]
    assert train[records[-1]["indices"]].tolist() == y.tolist()
