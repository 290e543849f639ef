import pytest
import torch
from torch import nn

from project.models.cnn import CNN

pytestmark = pytest.mark.floats


def test_layers_are_those_of_the_description():
    net = CNN((3, 224, 224), 10)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size) for m in convolutions] == [(64, (3, 3)), (128, (3, 3))]
    dense = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(128 * 7 * 7, 1024), (1024, 10)]


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (28, 28), (32, 48), (96, 64), (225, 300)])
def test_any_size_leaves_at_most_thirteen_by_thirteen(size):
    net = CNN((1, *size), 7, hidden_sizes=(8,), batch_norm=True, dropout=0.1)
    assert net(torch.randn(2, 1, *size)).shape == (2, 7)
    assert max(net.features(torch.randn(1, 1, *size)).shape[-2:]) <= 13
