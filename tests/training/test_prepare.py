"""`compile` and `channels_last` act on the nets of any module, and change no result."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from boltlab.training.prepare import Prepare, nets


class Plain(pl.LightningModule):
    """Two nets, a metric, and a child without parameters."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 3)
        self.flatten, self.mean = nn.Flatten(), MeanMetric()
        self.seen = []

    def forward(self, x):
        features = self.encoder(x)
        self.seen.append(features.is_contiguous(memory_format=torch.channels_last))
        return self.head(self.flatten(features))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(compile=False, channels_last=False, **settings):
    torch.manual_seed(0)
    module, data = Plain(), TensorDataset(torch.randn(8, 3, 4, 4), torch.arange(8) % 3)
    how = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[Prepare(compile, channels_last)], enable_model_summary=False, **how, **settings
    )
    trainer.fit(module, DataLoader(data, 4))
    return module


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, of its own asking
def test_compiling_changes_no_key_of_a_checkpoint_and_no_result(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = trained(), trained(compile=True)
    assert [net._compiled_call_impl is not None for net in nets(compiled)] == [True, True]
    assert nets(plain) == [plain.encoder, plain.head] and plain.encoder._compiled_call_impl is None
    for (name, value), (again, other) in zip(plain.state_dict().items(), compiled.state_dict().items(), strict=True):
        assert name == again and torch.allclose(value, other, atol=1e-6)


@pytest.mark.parametrize(
    ("compile", "accumulated", "mode"),
    [
        *((True, 1, "default"), ("reduce-overhead", 1, "reduce-overhead"), ("max-autotune", 1, "max-autotune")),
        *((True, 2, "default"), ("reduce-overhead", 2, "default"), ("max-autotune", 2, "max-autotune-no-cudagraphs")),
    ],
)
def test_cuda_graphs_are_not_recorded_where_batches_are_accumulated(monkeypatch, compile, accumulated, mode):
    trainer = pl.Trainer(logger=False, accelerator="cpu", accumulate_grad_batches=accumulated)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    assert Prepare(compile, False).mode(trainer) == mode


def test_channels_last_changes_the_layout_and_no_result():
    plain, other = trained(), trained(channels_last=True)
    assert other.encoder.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(other.seen) and not any(plain.seen)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name
