import pytest
import torch
from torch import nn

from project.models.lenet import LeNet

pytestmark = pytest.mark.floats


def classic(channels, padding):
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


@pytest.mark.parametrize(("shape", "padding", "count"), [((1, 28, 28), 2, 61_706), ((3, 32, 32), 0, 62_006)])
def test_classic_sizes_are_the_classic_net(shape, padding, count):
    net, other = LeNet(shape, 10), classic(shape[0], padding)
    assert sum(p.numel() for p in net.parameters()) == count
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.data.copy_(p.data)
    x = torch.randn(2, *shape)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 14), (31, 33), (64, 64), (224, 224)])
def test_any_size_leaves_small_maps(size):
    net = LeNet((3, *size), 7)
    assert net(torch.randn(2, 3, *size)).shape == (2, 7)
    assert max(net.features(torch.randn(1, 3, *size)).shape[-2:]) <= 9
