"""A small convolutional net for images of any size: two 3×3 convolutions, pooling, one wide dense layer."""

from torch import Tensor, nn

from project.models.mlp import Activation, activation_layer, dense_layers


class CNN(nn.Module):
    """Two 3×3 convolutions, each with 2×2 max pooling, and dense layers: [B, C, H, W] → [B, num_outputs].

    The dense layers see maps of about `grid`×`grid`, averaged down where the image is large, as VGG has it: at 224×224
    flattening the 56×56 maps would give the 1024 hidden units 411 million weights; 7×7 maps give them 6.4 million.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        channels: tuple[int, ...] = (64, 128),
        hidden_sizes: tuple[int, ...] = (1024,),
        grid: int = 7,
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        in_channels, height, width = input_shape
        layers: list[nn.Module] = []
        for out_channels in channels:
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers += [activation_layer(activation), nn.MaxPool2d(2)]
            in_channels, height, width = out_channels, height // 2, width // 2
        # A static kernel instead of adaptive pooling, whose gradient is not deterministic on CUDA.
        kernel = (max(1, height // grid), max(1, width // grid))
        if kernel != (1, 1):
            layers.append(nn.AvgPool2d(kernel))
        self.features = nn.Sequential(*layers)
        num_features = in_channels * (height // kernel[0]) * (width // kernel[1])
        self.classifier = dense_layers(num_features, hidden_sizes, num_outputs, activation, dropout, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.classifier(self.features(x).flatten(1))
        return output
