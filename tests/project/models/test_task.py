from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from boltlab.callbacks.lr_monitor import LRMonitor
from boltlab.data import ImageDataModule, TensorData
from boltlab.metrics import EpochMeans
from boltlab.optim.build import decayed_parameters
from boltlab.optim.schedulers import Constant, Cosine
from project.models.classifier import Classifier

pytestmark = pytest.mark.floats

SGD = partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)


def samples(count=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm((16,)), nn.Linear(16, 3))


def test_weights_decay_norms_and_biases_do_not():
    decays = {name: decays for name, _, decays in decayed_parameters(conv_net())}
    assert decays == {
        f"{i}.{kind}": kind == "weight" and i in (0, 4) for i in (0, 1, 3, 4) for kind in ("weight", "bias")
    }


def test_norms_of_two_dimensions_and_names_that_the_net_excludes_do_not_decay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm((2, 3))
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.weight = nn.Parameter(torch.zeros(1, 4))
            self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

        def no_weight_decay(self):
            return {"token"}

    decays = {name: decays for name, _, decays in decayed_parameters(Net())}
    assert decays == {"norm.weight": False, "norm.bias": False, "token": False, "weight": True}


@pytest.mark.parametrize("everywhere", [False, True])
def test_optimizer_gets_every_parameter_once_with_its_decay(trainer, data, everywhere):
    net = conv_net()
    model = Classifier(net, SGD, 3, scheduler=Constant(), decay_norms_and_biases=everywhere)
    runner = trainer()
    runner.fit(model, datamodule=data(torch.randn(8, 3, 4, 4), torch.arange(8) % 3))
    (optimizer,) = runner.optimizers
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    found = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert found["0.weight"] == found["4.weight"] == 0.5
    assert found["1.weight"] == found["4.bias"] == (0.5 if everywhere else 0.0)


def test_l1_is_trained_but_not_logged(trainer, data):
    x, y = samples(8)
    losses = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses["trained"] = outputs["loss"].item()

    net = nn.Linear(4, 3)
    size = net.weight.abs().sum().item()
    runner = trainer(callbacks=[Look()])
    runner.fit(Classifier(net, partial(torch.optim.SGD, lr=0.0), 3, l1=0.1), datamodule=data(x, y))
    logged = runner.callback_metrics["train_loss"].item()
    assert losses["trained"] == pytest.approx(logged + 0.1 * size, abs=1e-5)


class Kept(DummyLogger):
    """Keeps what is logged: (step, names)."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, *sorted(metrics)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_logs_only_on_the_steps_that_are_written(trainer, data, accumulate):
    x, y = samples()  # five batches: five optimizer steps an epoch, or three
    model = Classifier(nn.Linear(4, 3), SGD, 3)
    logger = Kept()
    settings = {"log_every_n_steps": 3, "accumulate_grad_batches": accumulate, "logger": logger}
    trainer(max_epochs=2, limit_val_batches=0, **settings).fit(model, datamodule=data(x, y))
    steps = [(step, "epoch", "train_loss_step") for step in ((2, 5, 8) if accumulate == 1 else (2, 5))]
    epochs = [(step, "epoch", "train_acc", "train_loss") for step in ((4, 9) if accumulate == 1 else (2, 5))]
    assert sorted(logger.rows) == sorted(steps + epochs)


def test_schedule_counts_optimizer_steps_of_accumulated_batches(trainer, data):
    x, y = samples()  # five batches of eight: three optimizer steps
    model = Classifier(nn.Linear(4, 3), SGD, 3, scheduler=Cosine(warmup_epochs=1))
    rates = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[Look()]).fit(model, datamodule=data(x, y))
    reference = Cosine(warmup_steps=3)
    assert rates == pytest.approx([0.1 * reference.factor(step, 3, 9, 3) for step in range(9)])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train_and_losses_stay_in_32_bits_or_more(trainer, data, precision):
    x, y = samples()

    class Normalize(data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].float(), batch[1]  # as the image data modules do, after Lightning's own conversion

    model = Classifier(nn.Linear(4, 3), SGD, 3, class_weights="balanced")
    runner = trainer(precision=precision)
    runner.fit(model, datamodule=Normalize((x * 40).to(torch.uint8), y))
    assert model.net.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        precision, torch.float32
    )
    with runner.precision_plugin.forward_context():
        assert model(x).dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert runner.callback_metrics["train_loss"].isfinite()


def test_metric_states_are_saved_and_a_started_epoch_goes_on(trainer, data):
    x, y = samples()
    model = Classifier(nn.Linear(4, 3), SGD, 3)
    saved = {}

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                saved.update({k: v.clone() for k, v in module.state_dict().items()})

    trainer(callbacks=[Stop()]).fit(model, datamodule=data(x, y))
    fresh = Classifier(nn.Linear(4, 3), SGD, 3)
    fresh.load_state_dict(saved)
    assert fresh.train_metrics.weight.item() == fresh.train_metrics.samples.item() == 24  # three batches of eight


def test_a_new_run_fetches_pretrained_weights_and_a_resumed_one_does_not(trainer, data, tmp_path):
    class Net(nn.Linear):
        fetched = 0

        def load_pretrained(self):
            Net.fetched += 1

    x, y = samples()
    runner = trainer()
    runner.fit(Classifier(Net(4, 3), SGD, 3), datamodule=data(x, y))
    assert Net.fetched == 1
    runner.save_checkpoint(tmp_path / "x.ckpt")
    runner.test(Classifier(Net(4, 3), SGD, 3), datamodule=data(x, y), verbose=False)
    again = trainer(max_epochs=2)
    again.ckpt_path = tmp_path / "x.ckpt"
    again.fit(Classifier(Net(4, 3), SGD, 3), datamodule=data(x, y))
    assert again.global_step == 10
    assert Net.fetched == 1


@pytest.mark.parametrize(
    ("shape", "normalization", "trained_on", "said"),
    [
        ((3, 2, 2), {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, None, ""),
        ((3, 2, 2), {"mean": [0.5], "std": [0.5]}, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, ""),
        (
            (3, 2, 2),
            {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"},
            "'data.mean=[0.5, 0.5, 0.5]', 'data.std=[0.5, 0.5, 0.5]', bicubic interpolation (the data's is bilinear)\n",
        ),
        ((3, 2, 2), {}, {"mean": (0.0,) * 3, "std": (0.2,) * 3}, "images: 'data.std=[0.2, 0.2, 0.2]'\n"),
        ((1, 2, 2), {"mean": [0.1]}, {"mean": (0.5,) * 3, "interpolation": "bilinear"}, ""),
    ],
)
def test_images_unlike_those_of_the_pretrained_weights_are_named(
    trainer, capsys, shape, normalization, trained_on, said
):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1))

        def load_pretrained(self):
            return trained_on

    class Images(ImageDataModule):
        def load(self, split):
            return TensorData(torch.zeros(8, *shape, dtype=torch.uint8), torch.arange(8) % 3)

    images = Images(input_shape=shape, num_classes=3, num_workers=0, **normalization)
    trainer(limit_val_batches=0).fit(Classifier(Net(shape[0] * 4, 3), SGD, 3), datamodule=images)
    out = capsys.readouterr().out
    assert out.endswith(said) and ("the pretrained weights were trained with other images: " in out) == bool(said)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "precision", "fused"),
    [
        (partial(torch.optim.AdamW, fused=None), torch.float32, "32-true", True),
        (partial(torch.optim.SGD, lr=0.1), torch.float32, "bf16-mixed", True),
        (partial(torch.optim.AdamW, fused=False), torch.float32, "32-true", False),
        (partial(torch.optim.AdamW, fused=None), torch.float16, "32-true", None),
        (partial(torch.optim.AdamW, fused=None), torch.float32, "16-mixed", None),
        (partial(torch.optim.AdamW, foreach=True), torch.float32, "32-true", None),
        (torch.optim.RMSprop, torch.float32, "32-true", None),  # has no such form
    ],
)
def test_an_optimizer_is_fused_where_it_can_be(optimizer, dtype, precision, fused, monkeypatch):
    model = Classifier(nn.Linear(4, 3).to(dtype), optimizer, 3)
    model._trainer = type("Settings", (), {"precision": precision, "barebones": False})()
    assert model.configure_optimizers().param_groups[0].get("fused") is fused


def test_the_training_means_are_those_of_all_batches():
    means = EpochMeans("acc", steps_together=3)
    batches = [(0.5, 8, 4, 8), (1.5, 8, 5, 8), (2.0, 8, 6, 8), (4.0, 3, 1, 3), (1.0, torch.tensor(2.5), 2, 3)]
    for loss, weight, value, count in batches:
        means.add(torch.tensor(loss), weight, torch.arange(count) < value)
    expected = {"train_loss": (4 * 8 + 4 * 3 + 2.5) / (3 * 8 + 3 + 2.5), "train_acc": 18 / 30}
    assert means.state_dict()["samples"] == 30
    assert {name: mean.item() for name, mean in means.compute().items()} == pytest.approx(expected)
    means.reset()
    means.add(torch.tensor(1.0), 2, torch.tensor([True, False]))
    assert means.compute()["train_loss"] == 1


def test_clipping_reaches_a_hook_of_a_base_class_and_a_second_fit(trainer, data):
    clipped = []

    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            clipped.append(gradient_clip_val)

    class Grandchild(Clips):
        pass

    x, y = torch.randn(8, 4), torch.arange(8) % 3
    trainer().fit(Grandchild(nn.Linear(4, 3), SGD, 3), datamodule=data(x, y))
    assert clipped == [None]
    model = Classifier(nn.Linear(4, 3), partial(torch.optim.SGD, lr=1.0), 3)
    trainer().fit(model, datamodule=data(x, y))
    before = model.net.weight.clone()
    trainer(gradient_clip_val=1e-9).fit(model, datamodule=data(x, y))
    assert (model.net.weight - before).abs().max() < 1e-6


def test_rates_are_logged_beside_a_training_step_of_ones_own(trainer, data):
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            return self.criterion(self(batch[0]), batch[1])[0]

    logger = Kept()
    model = Own(nn.Linear(4, 3), SGD, 3)
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    trainer(logger=logger, log_every_n_steps=1, callbacks=[LRMonitor()]).fit(model, datamodule=data(x, y))
    assert [row[0] for row in logger.rows if "lr" in row] == [0, 1]


def test_complex_weights_train_without_a_fused_optimizer(trainer, data):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))

        def forward(self, x):
            return torch.fft.ifft(x @ self.weight.T.to(torch.cfloat)).abs()

    runner = trainer()
    x, y = torch.randn(8, 4, dtype=torch.cfloat), torch.arange(8) % 3
    model = Classifier(Spectral(), partial(torch.optim.AdamW, lr=0.1), 3)
    model.forward = lambda x: model.net(x)
    runner.fit(model, datamodule=data(x, y))
    assert not runner.optimizers[0].param_groups[0]["fused"]
