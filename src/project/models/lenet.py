"""LeNet: two 5×5 convolutions and three dense layers."""

from torch import Tensor, nn

from project.models.mlp import Activation, activation_layer, dense_layers


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with max pooling and ReLU: [B, C, H, W] → [B, num_outputs].

    At 28×28 (padded by 2, as in the paper) and at 32×32 (not padded) the classifier sees 5×5 maps and the net has the
    classic sizes: 61,706 parameters for MNIST, 62,006 for CIFAR-10. Other sizes work too: the last pooling
    is chosen such that about 5×5 remain.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        channels: tuple[int, int] = (6, 16),
        hidden_sizes: tuple[int, ...] = (120, 84),
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        in_channels, *size = input_shape
        layers: list[nn.Module] = []
        for i, out_channels in enumerate(channels):
            # Padding where the classic sizes have it, and where a map is too small for an unpadded 5×5 kernel.
            padding = 2 if (i == 0 and min(size) < 32) or min(size) < 10 else 0
            size = [s + 2 * padding - 4 for s in size]
            # A static kernel instead of adaptive pooling, whose gradient is not deterministic on CUDA.
            kernel = [2, 2] if i == 0 else [max(2, s // 5) for s in size]
            size = [s // k for s, k in zip(size, kernel, strict=True)]
            layers.append(nn.Conv2d(in_channels, out_channels, 5, padding=padding, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers += [activation_layer(activation), nn.MaxPool2d((kernel[0], kernel[1]))]
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        num_features = in_channels * size[0] * size[1]
        self.classifier = dense_layers(num_features, hidden_sizes, num_outputs, activation, dropout, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.classifier(self.features(x).flatten(1))
        return output
