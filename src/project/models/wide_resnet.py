"""Wide residual networks: few layers, many channels."""

from torch import Tensor, nn

from project.models.resnet import Stem, conv, initialize_convolutions, stem_layers


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3×3 convolution, twice, beside a shortcut that is projected after the first norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv(channels, channels, 3)
        changes = stride != 1 or in_channels != channels
        self.shortcut = conv(in_channels, channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.dropout(self.relu2(self.bn2(y))))
        output: Tensor = y + kept
        return output


class WideResNet(nn.Module):
    """WRN-`depth`-`width_factor` (Zagoruyko and Komodakis 2016): [B, C, H, W] → [B, num_outputs].

    Three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `width_factor` channels. WRN-28-10 has 36.5 million
    parameters; 64 pixels and more get the ImageNet stem, as in ResNet.

    Raises:
        ValueError: depth - 4 is no multiple of 6.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        depth: int = 28,
        width_factor: int = 10,
        dropout: float = 0.0,
        stem: Stem = "auto",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is none of 10, 16, 22, 28, …: 4 layers and 6 for each block of a stage")
        in_channels = 16
        self.conv1, self.maxpool = stem_layers(input_shape, stem, in_channels)
        stages = []
        for i in range(3):
            channels = 16 * width_factor * 2**i
            blocks = []
            for j in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(in_channels, channels, 2 if i > 0 and j == 0 else 1, dropout))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_outputs)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.maxpool(self.conv1(x)))
        x = self.avgpool(self.relu(self.bn(x)))
        output: Tensor = self.fc(x.flatten(1))
        return output

    @staticmethod
    def check_arguments(arguments: dict[str, object]) -> list[tuple[str, str]]:
        """A depth that the three stages cannot share."""
        depth = arguments.get("depth", 28)
        if isinstance(depth, int) and (depth < 10 or (depth - 4) % 6):
            return [("depth", "is 10, 16, 22, 28, …: 4 layers and 6 for each block of a stage")]
        return []
