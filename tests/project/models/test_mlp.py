import pytest
import torch
from torch import nn

from project.models.mlp import MLP, activation_layer

pytestmark = pytest.mark.floats


def test_layers_stand_in_their_order():
    kinds = [type(layer) for layer in MLP((1, 4, 4), 3, (8,), "gelu", dropout=0.1, batch_norm=True).layers]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Dropout, nn.Linear]


def test_mnist_net_has_its_classic_size():
    assert sum(p.numel() for p in MLP((1, 28, 28), 10, (128,)).parameters()) == 101_770


def test_without_hidden_sizes_it_is_linear():
    net = MLP((2, 3), 4, ())
    x, y = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    bias = net(torch.zeros(1, 2, 3))
    assert torch.allclose(net(x + y) - bias, net(x) + net(y) - 2 * bias, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "silu", "tanh"])
def test_activations_are_new_modules_that_change_nothing_in_place(name):
    layer = activation_layer(name)
    assert layer is not activation_layer(name)
    x = torch.linspace(-2, 2, 9)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)
