"""Dense layers: the multilayer perceptron, linear models, and the classifiers on top of small convolutional nets."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh"]


def activation_layer(name: Activation) -> nn.Module:
    """A new activation module; each is used once, so that hooks, quantizers and exporters can tell them apart."""
    layers: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
    }
    return layers[name]()


def dense_layers(
    num_inputs: int,
    hidden_sizes: Sequence[int],
    num_outputs: int,
    activation: Activation,
    dropout: float,
    batch_norm: bool,
) -> nn.Sequential:
    """Linear (batch norm) activation (dropout) for each hidden size, then the linear output layer: [B, F] → [B, K].

    PyTorch's own initialization, uniform in ±1/√fan_in: nets as shallow as these train well from it.
    """
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers.append(nn.Linear(num_inputs, size, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size))
        layers.append(activation_layer(activation))
        if dropout:
            layers.append(nn.Dropout(dropout))
        num_inputs = size
    return nn.Sequential(*layers, nn.Linear(num_inputs, num_outputs))


class MLP(nn.Module):
    """Dense layers on the flattened input [B, …] → [B, num_outputs]; without hidden sizes, a linear model."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        hidden_sizes: tuple[int, ...] = (128,),
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        num_inputs = math.prod(input_shape)
        self.layers = dense_layers(num_inputs, hidden_sizes, num_outputs, activation, dropout, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x.flatten(1))
        return output
