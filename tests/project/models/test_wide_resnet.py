import pytest
import torch

from project.models.wide_resnet import WideResNet

pytestmark = pytest.mark.floats


def test_wrn_28_10_has_the_size_of_the_paper():
    with torch.device("meta"):
        net = WideResNet((3, 32, 32), 10)
    assert sum(p.numel() for p in net.parameters()) == 36_479_194


def test_depth_counts_convolutions_and_the_last_layer():
    net = WideResNet((3, 8, 8), 10, depth=16, width_factor=1)
    weights = [n for n, p in net.named_parameters() if p.ndim > 1 and "shortcut" not in n]
    assert len(weights) == 16 - 2  # the paper counts the two projections of width, which stand beside the path
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("depth", [4, 18, 27])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth {depth} is none of 10, 16, 22, 28"):
        WideResNet((3, 8, 8), 10, depth=depth)
    assert [name for name, _ in WideResNet.check_arguments({"depth": depth})] == ["depth"]
    assert WideResNet.check_arguments({"depth": 28}) == []
