import pytest
import torch

from boltlab.config import auto as machine
from boltlab.config.build import build
from boltlab.config.compose import compose

QUICK = ("logger=csv", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("has_bf16", "overrides", "precision", "channels_last"),
    [
        (True, ["experiment=mnist_lenet"], "32", False),
        (True, ["model=resnet18", "data=cifar10"], "bf16-mixed", True),
        (False, ["model=resnet18", "data=cifar10"], "32", False),
        (True, ["model=resnet18", "data=cifar10", "precision=32"], "32", False),
        (True, ["model=resnet18", "data=cifar10", "channels_last=false"], "bf16-mixed", False),
        (True, ["data=diabetes", "model=mlp_regressor"], "32", False),
    ],
)
def test_a_cpu_takes_bf16_for_large_nets_only(monkeypatch, has_bf16, overrides, precision, channels_last):
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: has_bf16)
    config = compose("train", [*QUICK, *overrides]).config
    assert (str(config.precision), config.channels_last) == (precision, channels_last)
    assert config.trainer.precision == config.precision
    assert (config.compile, config.float32_matmul_precision) == (False, "highest")


def test_cuda_takes_bf16_channels_last_and_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = compose("train", ["logger=csv", "model=lenet"]).config
    assert (config.precision, config.channels_last, config.float32_matmul_precision) == ("bf16-mixed", True, "high")
    assert compose("train", ["logger=csv", "model=mlp"]).config.channels_last is False


def test_a_net_is_weighed_without_touching_the_random_state():
    config = compose("train", [*QUICK, "model=resnet18", "data=cifar10"]).config
    before = torch.get_rng_state()
    convolutions, flops = machine.weigh(config, build)
    assert convolutions and flops == pytest.approx(1.11e9, rel=0.01)
    assert torch.equal(torch.get_rng_state(), before)
