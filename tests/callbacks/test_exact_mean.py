"""A step of accumulated batches is that of one batch which holds all of their samples."""

import sys

import pytest
import torch
from warm import FORKED, only_run

from boltlab import runs

# 21 batches of 16 (the last of 10 samples) in windows of 4, or 6 of 64 (the last of 10): the same steps.
QUICK = (
    *("logger=csv", "trainer.accelerator=cpu", "test=false", "callbacks=[last]", "trainer.max_epochs=2"),
    *("optimizer=sgd", "scheduler=constant", "optimizer.lr=0.5", "data.max_samples=330", "data.input_shape=[1,8,8]"),
)
SMALL, LARGE = ("data.batch_size=16", "trainer.accumulate_grad_batches=4"), ("data.batch_size=64",)
MLP = ("model=mlp", "model.net.hidden_sizes=[8]")
SHAPE = "data.input_shape=[10]"
OPTIONS = {
    "classifier": MLP,
    "class weights": (*MLP, "model.class_weights=balanced", "model.label_smoothing=0.1"),
    "l1 and clipping": (*MLP, "model.l1=1e-3", "trainer.gradient_clip_val=0.1"),
    "values clipped": (*MLP, "trainer.gradient_clip_val=0.01", "trainer.gradient_clip_algorithm=value"),
    "regressor": ("data=diabetes", "data.standardize_target=true", "model=mlp_regressor", "optimizer.lr=0.05", SHAPE),
}
PLAIN = """
import lightning as L
import torch
from torch import nn


class Plain(L.LightningModule):
    def __init__(self, reduction: str = "mean", manual: bool = False, uneven: bool = False) -> None:
        super().__init__()
        if uneven:
            self.transfer_batch_to_device = self.some
        self.net = nn.Linear(64, 10)
        self.reduction = reduction
        self.automatic_optimization = not manual

    def some(self, batch, device, dataloader_idx):
        # Of 16 samples, the second process takes every other one, and of these the first four alone.
        place = torch.arange(len(batch[0]))
        kept = place < 4 if self.global_rank else place >= 0
        if self.trainer.world_size == 1:
            kept = (place % 2 == 0) | (place % 16 < 8)
        return [part[kept] for part in batch] if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1], reduction=self.reduction)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean(), on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)
"""


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Overrides that train a LightningModule of somebody's own."""
    (tmp_path / "plain_module.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("plain_module", None)
    return ("~model", "+model._target_=plain_module.Plain", "~scheduler", "monitor=val_acc")


def weights(boltlab, name, *overrides):
    code, out, err = boltlab("train", *overrides, f"name={name}")
    assert code == 0, err
    folder = next(folder for folder in runs.folders("logs") if f"_{name}-" in folder.name)
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = {k: v.double() for k, v in content["state_dict"].items() if k.startswith("net.")}
    return state, content["global_step"], out


def distance(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("chosen", OPTIONS)
def test_a_window_is_one_large_batch(chosen, boltlab):
    small, steps, out = weights(boltlab, "small", *QUICK, *OPTIONS[chosen], *SMALL)
    large, expected, _ = weights(boltlab, "large", *QUICK, *OPTIONS[chosen], *LARGE)
    assert steps == expected and "last window" not in out
    assert distance(small, large) < 1e-5


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches != 1.` and overriding")
def test_windows_that_a_schedule_makes_longer(boltlab):
    """One batch a step in the first epoch, four in the second: as with the batch size of the second resumed there."""
    scheduled = ("+callbacks.s._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler",)
    scheduled += ("+callbacks.s.scheduling={0:1,1:4}",)
    small, _, _ = weights(boltlab, "small", *QUICK, *MLP, "data.batch_size=16", *scheduled)
    weights(boltlab, "first", *QUICK, *MLP, "data.batch_size=16", "trainer.max_epochs=1")
    longer = ("trainer.max_epochs=2", "data.batch_size=64", "resume_changed=restart_epoch")
    code, _, err = boltlab("train", "resume=first", *longer)
    assert code == 0, err
    folder = next(folder for folder in runs.folders("logs") if "_first-" in folder.name)
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert distance(small, {k: v.double() for k, v in content.items() if k.startswith("net.")}) < 1e-5


def test_full_windows_of_equal_batches_keep_their_bits(boltlab, monkeypatch):
    even = ("data.max_samples=320", *SMALL)
    ours, _, _ = weights(boltlab, "ours", *QUICK, *MLP, *even)
    monkeypatch.setattr("project.models.classifier.Classifier.configure_callbacks", lambda self: [])
    lightnings, _, _ = weights(boltlab, "lightning", *QUICK, *MLP, *even)
    assert distance(ours, lightnings) == 0


@pytest.mark.slow
def test_on_two_processes(boltlab, warm):
    chosen = (*QUICK, *MLP, "model.class_weights=balanced")
    child = warm("train", *chosen, *SMALL, "trainer=ddp", "trainer.devices=2", "name=two", before=FORKED).wait()
    assert child.code == 0, child.stderr
    content = torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    large, _, _ = weights(boltlab, "large", *chosen, *LARGE)
    assert distance({name: content[name].double() for name in large}, large) < 1e-5


def test_a_module_of_ones_own_asks_for_it(plain, boltlab):
    given = [text for text in QUICK if not text.startswith(("scheduler", "callbacks", "optimizer"))]
    off, _, said = weights(boltlab, "off", *given, "callbacks=[last]", *plain, *SMALL)
    on, _, quiet = weights(boltlab, "on", *given, "callbacks=[last,exact_mean]", *plain, *SMALL)
    large, _, alone = weights(boltlab, "large", *given, "callbacks=[last]", *plain, *LARGE)
    assert distance(on, large) < 1e-5 < 1e-2 < distance(off, large)
    assert "callbacks=[default,exact_mean]" in said
    assert "exact_mean" not in quiet and "exact_mean" not in alone


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
@pytest.mark.parametrize("uneven", ["false", "true"])
def test_a_module_of_ones_own_on_two_processes(plain, boltlab, warm, uneven):
    """21 full batches: one left for the last window; each process counts its own samples."""
    given = [text for text in QUICK if not text.startswith(("scheduler", "callbacks", "optimizer"))]
    given += ["data.max_samples=336", f"+model.uneven={uneven}"]
    two = ("trainer=ddp", "trainer.devices=2", "name=two", "callbacks=[last,exact_mean]")
    child = warm("train", *plain, *given, *SMALL, *two, before="sys.path.insert(0, os.getcwd())" + FORKED).wait()
    assert child.code == 0, child.stderr
    content = torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    large, _, _ = weights(boltlab, "large", *plain, *given, "callbacks=[last]", *LARGE)
    assert distance({name: content[name].double() for name in large}, large) < 1e-5


def test_manual_optimization_is_left_alone_and_refuses_it(plain, boltlab):
    given = [text for text in QUICK if not text.startswith(("scheduler", "callbacks", "optimizer"))]
    manual = (*given, *plain, "+model.manual=true")
    code, out, err = boltlab("train", *manual, "callbacks=[last]", "data.batch_size=16")
    assert code == 0 and "exact_mean" not in out, err
    code, _, err = boltlab("train", *manual, "callbacks=[last,exact_mean]", "data.batch_size=16")
    assert code == 1 and "optimizes manually" in err
