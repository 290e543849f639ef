"""In every `precision`, epoch values are those of float64 arithmetic on the checkpoint's own outputs."""

import copy
import csv
import signal
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error, r2_score
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError, R2Score
from warm import FORKED, at_step, only_run

import boltlab as package
from boltlab import runs
from boltlab.__main__ import main
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.training.trainer import make_trainer

QUICK = ("logger=csv", "callbacks=[best,last]", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64": torch.float64, "bf16-mixed": torch.float32}
CASES = {
    "classes": ("data=digits", "augment=none", "model=mlp", "model.net.hidden_sizes=[32]"),
    "classes, small batches": (
        *("data=synthetic", "data.num_classes=3", "data.num_features=6", "data.num_informative=4"),
        *("data.num_rows=2000", "model=mlp", "data.batch_size=16"),
    ),
    "numbers": ("data=diabetes", "model=mlp_regressor", "data.batch_size=16"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run in 32 bits for each case."""
    folders = {}
    for name, overrides in CASES.items():
        log_dir = tmp_path_factory.mktemp("trained")
        epochs = "trainer.max_epochs=20" if name == "numbers" else "trainer.max_epochs=2"
        assert main(["train", *QUICK, *overrides, epochs, "test=false", "precision=32", f"log_dir={log_dir}"]) == 0
        folders[name] = next(runs.folders(log_dir))
    return folders


def expected(folder, split, precision):
    """The metrics of the checkpoint, computed by numpy and scikit-learn from its outputs on each batch."""
    data = build(runs.load_config(folder), "data")
    model = package.load(folder).to(DTYPES[precision])
    outputs, targets = [], []
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with torch.no_grad(), autocast:
        for batch in data.dataloader(split):
            x, target = data.on_after_batch_transfer(batch, 0)
            outputs.append(model(x).double().numpy())
            targets.append(target.numpy())
    output, target = np.concatenate(outputs), np.concatenate(targets)
    if target.dtype.kind == "f":
        mse = mean_squared_error(target, output)
        return {"loss": mse, "mse": mse, "mae": mean_absolute_error(target, output), "r2": r2_score(target, output)}
    classes = output.argmax(1)
    loss = -log_softmax(output, axis=1)[np.arange(len(target)), target].mean()
    return {"loss": loss, "acc": accuracy_score(target, classes), "f1": f1_score(target, classes, average="macro")}


def still(trained, case, precision):
    """A run of two epochs with those weights and so small a rate that they stay."""
    begin = (f"init_from={trained[case]}", "trainer.max_epochs=2", f"precision={precision}")
    rate = ("optimizer=sgd", "optimizer.lr=1e-12", "optimizer.weight_decay=0", "scheduler=constant")
    return ("train", *QUICK, *CASES[case], *begin, *rate)


def assert_right(folder, precision):
    # The loss of a batch is float32's; sums of it, float64's.
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "val", "test"):
        right = {f"{split}_{name}": value for name, value in expected(folder, split, precision).items()}
        logged = [{k: float(row[k]) for k in right if row.get(k)} for row in rows]
        logged = [row for row in logged if row]
        assert len(logged) == (1 if split == "test" else 2)
        for row in logged:
            assert row == pytest.approx({k: right[k] for k in row}, rel=1e-5, abs=1e-6)
            assert split == "train" or row.keys() == right.keys()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_epoch_values_are_those_of_the_outputs(boltlab, trained, case, precision):
    code, _, err = boltlab(*still(trained, case, precision))
    assert code == 0, err
    folder = next(runs.folders("logs"))
    assert_right(folder, precision)
    assert boltlab("eval", f"run={trained[case]}", "split=val", f"precision={precision}")[0] == 0
    measured = runs.read_summary(next(runs.folders("logs", "eval")))["test"]
    right = {f"val_{name}": value for name, value in expected(trained[case], "val", precision).items()}
    assert {k: measured[k] for k in right} == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_a_run_that_resumes_within_an_epoch_counts_on(boltlab, warm, trained):
    """Its metrics carry values when the module is converted, here of two thirds of the second epoch."""
    command = still(trained, "classes, small batches", "bf16-true")
    assert warm(*command, before=at_step(150, signal.SIGTERM)).wait().code == 128 + signal.SIGTERM
    code, out, err = boltlab("train", "resume=latest")
    assert code == 0 and "1 epochs done, after batch 6" in out, err
    assert_right(only_run(), "bf16-true")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["classes", "numbers"])
def test_two_processes_count_in_full_precision(warm, trained, case):
    child = warm(*still(trained, case, "bf16-true"), "trainer.devices=2", before=FORKED).wait()
    assert child.code == 0, child.stderr
    assert_right(only_run(), "bf16-true")


class Plain(pl.LightningModule):
    """A module of anybody's: metrics in attributes, collections and wrappers, logged each in its way."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.accuracy = MetricCollection({"acc": MulticlassAccuracy(3, average="micro")}, prefix="val_")
        self.area = BinaryAUROC(thresholds=[0.0, 0.1234567, 0.3456789, 0.5678901, 1.0])
        self.wrapped = MinMaxMetric(MeanMetric())
        self.seen = {"train": [], "val": []}

    def configure_model(self):
        self.late = MetricCollection([MeanSquaredError(), R2Score()])

    def on_train_start(self):
        # The first validation, before the training, has reset all but this one.
        assert self.wrapped._base_metric.weight == 1200

    def loss(self, batch, split):
        output = self.net(batch[0]).float()
        self.seen[split].append((output.detach(), batch[1]))
        return output, F.cross_entropy(output, batch[1])

    def training_step(self, batch, batch_idx):
        _, loss = self.loss(batch, "train")
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        output, loss = self.loss(batch, "val")
        first = output.softmax(1)[:, 0]
        self.accuracy(output, batch[1])
        self.area(first, (batch[1] == 0).int())
        self.wrapped.update(loss, weight=len(output))
        self.late.update(first, (batch[1] == 0).float())
        self.log_dict(self.accuracy)
        self.log("val_loss", loss)
        self.log("largest", output.max(), reduce_fx="max")

    def on_validation_epoch_end(self):
        self.log("area", self.area.compute())
        self.area.reset()
        self.log_dict(self.late.compute())
        self.late.reset()
        self.log("mean", self.wrapped.compute()["raw"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-12)


@pytest.mark.parametrize("precision", DTYPES)
def test_metrics_of_a_plain_module(precision, tmp_path):
    rows = ("data=synthetic", "model=mlp", "data.num_classes=3", "data.num_features=6", "data.num_informative=4")
    rows += ("data.num_rows=4000", "data.val_fraction=1200", "data.batch_size=64", "optimizer=sgd")
    config = compose("train", [*QUICK, *rows, "callbacks=none", "test=false", f"precision={precision}"]).config
    config.update({"run_dir": str(tmp_path)})
    config.trainer.update({"max_epochs": 1, "enable_checkpointing": False})
    torch.manual_seed(0)
    model, trainer = Plain(), make_trainer(config)
    for verb in (trainer.validate, trainer.fit):
        model.seen = {"train": [], "val": []}
        verb(model, datamodule=build(config, "data"))
        seen = {split: map(torch.cat, zip(*pairs, strict=True)) for split, pairs in model.seen.items() if pairs}
        seen = {split: (output.double().numpy(), target.numpy()) for split, (output, target) in seen.items()}
        losses = {s: -log_softmax(o, 1)[np.arange(len(t)), t].mean() for s, (o, t) in seen.items()}
        output, target = seen["val"]
        first, is_first = np.exp(log_softmax(output, 1))[:, 0], (target == 0).astype(float)
        thresholds = [0, 0.1234567, 0.3456789, 0.5678901, 1]
        rates = [[(first[is_first == kind] >= t).mean() for t in thresholds] for kind in (0, 1)]
        right = {
            **{f"{split}_loss": loss for split, loss in losses.items()},
            "mean": losses["val"],
            "val_acc": accuracy_score(target, output.argmax(1)),
            "area": -np.trapezoid(rates[1], rates[0]),
            "MeanSquaredError": mean_squared_error(is_first, first),
            "R2Score": r2_score(is_first, first),
            "largest": output.max(),
        }
        assert {k: float(v) for k, v in trainer.callback_metrics.items()} == pytest.approx(right, rel=1e-5, abs=1e-5)


class Fused(pl.LightningModule):
    """A plain module with a fused optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9, fused=True)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(
    ("optimizer", "overrides"),
    [
        ("sgd", ()),
        ("adamw", ()),
        ("sgd", ("trainer.accumulate_grad_batches=2",)),
        ("plain", ()),
    ],
)
def test_bf16_clips_what_a_fused_optimizer_takes(optimizer, overrides, algorithm, tmp_path):
    """As a loop of torch alone does it, with an optimizer that is not fused."""
    rows = ("data=synthetic", "model=mlp", "data.num_classes=3", "data.num_features=6", "data.num_informative=4")
    rows += ("data.num_rows=700", "data.batch_size=64", "model.net.hidden_sizes=[16]", "precision=bf16-mixed")
    clip = {"norm": 0.05, "value": 0.01}[algorithm]
    rows += (f"trainer.gradient_clip_val={clip}", f"trainer.gradient_clip_algorithm={algorithm}", *overrides)
    rate = () if optimizer == "plain" else (f"optimizer={optimizer}", "optimizer.lr=0.1", "scheduler=constant")
    config = compose("train", [*QUICK, *rows, *rate, "callbacks=none", "test=false"]).config
    config.update({"run_dir": str(tmp_path)})
    config.trainer.update({"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0})
    torch.manual_seed(0)
    data, model = build(config, "data"), Fused() if optimizer == "plain" else build(config, "model")
    net, batches = copy.deepcopy(model.net), list(build(config, "data").train_dataloader())
    make_trainer(config).fit(model, datamodule=data)
    assert model.optimizers().param_groups[0]["fused"]

    made = configured(net, config.optimizer) if optimizer != "plain" else torch.optim.SGD(net.parameters(), 0.5, 0.9)
    limits = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    every = config.trainer.accumulate_grad_batches
    before = [p.detach().clone() for p in net.parameters()]
    for number, (x, target) in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(x).float(), target) / every
        loss.backward()
        if number % every == 0:
            assert nn.utils.get_total_norm(p.grad for p in net.parameters()) > clip
            limits[algorithm](net.parameters(), clip)
            made.step()
            made.zero_grad()
    for ours, right, start in zip(model.net.parameters(), net.parameters(), before, strict=True):
        # A weight that two kernels round to neighbours of bf16 differs by 0.4 %.
        assert (ours - right).norm() < 0.02 * (right - start).norm()


def configured(net, node):
    """The optimizer of a config, with the decay of weights and without that of biases, and not fused."""
    arguments = {k: v for k, v in node.items() if not k.startswith("_") and k != "fused"}
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return getattr(torch.optim, node._target_.rsplit(".", 1)[1])([{"params": weights}, biases], **arguments)
