"""Residual networks of 18, 34 and 50 layers, for small and for large images.

torchvision's nets, but each activation is a module of its own and nothing is changed in place: hooks, Opacus' gradients
per sample, torchao's quantizer and torch.export all need that. Parameter names are torchvision's, so its weights fit.
"""

from typing import Literal

from torch import Tensor, nn

Stem = Literal["auto", "small", "imagenet"]


def stem_layers(input_shape: tuple[int, int, int], stem: Stem, out_channels: int) -> tuple[nn.Conv2d, nn.Module]:
    """First convolution (to `out_channels`) and the pooling that comes after it.

    "auto" takes the ImageNet stem, which makes a quarter of height and width, for images of 64 pixels and more; smaller
    ones keep their size, with a 3×3 convolution and no pooling.
    """
    channels, height, width = input_shape
    if stem == "imagenet" or (stem == "auto" and min(height, width) >= 64):
        return conv(channels, out_channels, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
    return conv(channels, out_channels, 3), nn.Identity()


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width, divided by the stride; a norm follows, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al. 2015)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()
        self.downsample = shortcut(in_channels, channels, stride)
        nn.init.zeros_(self.bn2.weight)  # the block begins as its shortcut (Goyal et al. 2017)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        output: Tensor = self.relu2(y + self.downsample(x))
        return output


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the stride is in the 3×3 one (ResNet v1.5)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv(in_channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = conv(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels), nn.ReLU()
        self.downsample = shortcut(in_channels, 4 * channels, stride)
        nn.init.zeros_(self.bn3.weight)  # the block begins as its shortcut (Goyal et al. 2017)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        output: Tensor = self.relu3(y + self.downsample(x))
        return output


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The input as it is, or projected by a 1×1 convolution where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Four stages of residual blocks: [B, C, H, W] → [B, num_outputs]."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_outputs: int,
        depth: Literal[18, 34, 50] = 18,
        stem: Stem = "auto",
    ) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = Bottleneck if depth == 50 else BasicBlock
        repeats = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
        self.conv1, self.maxpool = stem_layers(input_shape, stem, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        stages = []
        in_channels = 64
        for i, count in enumerate(repeats):
            channels = 64 * 2**i
            blocks = []
            for j in range(count):
                blocks.append(block(in_channels, channels, stride=2 if i > 0 and j == 0 else 1))
                in_channels = channels * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_outputs)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        output: Tensor = self.fc(self.avgpool(x).flatten(1))
        return output


def initialize_convolutions(net: nn.Module) -> None:
    """He et al.'s normal initialization by fan-out, which keeps the size of gradients through the ReLUs."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
