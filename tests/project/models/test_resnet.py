import pytest
import torch
import torchvision.models
from torch import nn

from project.models.resnet import ResNet

pytestmark = pytest.mark.floats


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_parameters_and_outputs_are_those_of_torchvision(depth):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", num_classes=10)
    ours = ResNet((3, 64, 64), 10, depth)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_small_images_keep_their_size_in_the_stem():
    small, large = ResNet((1, 63, 63), 10), ResNet((1, 64, 64), 10)
    assert small.maxpool(small.conv1(torch.zeros(1, 1, 63, 63))).shape[-2:] == (63, 63)
    assert large.maxpool(large.conv1(torch.zeros(1, 1, 64, 64))).shape[-2:] == (16, 16)
    assert isinstance(ResNet((3, 32, 32), 10, stem="imagenet").maxpool, nn.MaxPool2d)
    assert isinstance(ResNet((3, 224, 224), 10, stem="small").maxpool, nn.Identity)


@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_begin_as_their_shortcut(depth):
    block = ResNet((3, 32, 32), 10, depth).layer1[1]
    x = torch.rand(2, 64 if depth == 18 else 256, 8, 8)
    assert torch.equal(block(x), x)
