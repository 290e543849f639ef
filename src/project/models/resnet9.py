"""A residual network of nine layers that learns small images fast."""

from torch import Tensor, nn


class ResNet9(nn.Module):
    """David Page's net for CIFAR-10 (DAWNBench, github.com/davidcpage/cifar10-fast): [B, C, H, W] → [B, num_outputs].

    Four stages of 3×3 convolution, batch norm and ReLU, each but the first halving height and width; a residual block
    of two such layers after the second and the fourth; the maximum over the image; a linear layer, times
    `output_scale`, which keeps the logits of a high learning rate small. Images from 8 pixels on.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        channels: tuple[int, int, int, int] = (64, 128, 256, 512),
        output_scale: float = 0.125,
    ) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.stage1 = layer(input_shape[0], first)
        self.stage2 = nn.Sequential(layer(first, second, pool=True), Residual(second))
        self.stage3 = layer(second, third, pool=True)
        self.stage4 = nn.Sequential(layer(third, fourth, pool=True), Residual(fourth))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(fourth, num_outputs, bias=False)
        self.output_scale = output_scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        output: Tensor = self.fc(self.pool(x).flatten(1)) * self.output_scale
        return output


class Residual(nn.Module):
    """Two layers beside the input itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer1 = layer(channels, channels)
        self.layer2 = layer(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.layer2(self.layer1(x))
        return output


def layer(in_channels: int, out_channels: int, pool: bool = False) -> nn.Sequential:
    """3×3 convolution, batch norm, ReLU and, with `pool`, the maximum of each 2×2 pixels."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    parts: list[nn.Module] = [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*parts, nn.MaxPool2d(2)) if pool else nn.Sequential(*parts)
