import pytest
import torch

from project.models.resnet9 import Residual, ResNet9

pytestmark = pytest.mark.floats


def test_it_has_the_layers_of_the_source():
    net = ResNet9((3, 32, 32), 10)
    # Convolutions, two numbers a channel of each norm, and a linear layer without bias.
    pairs = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert sum(p.numel() for p in net.parameters()) == sum(9 * i * o + 2 * o for i, o in pairs) + 512 * 10
    x = net.stage1(torch.zeros(1, 3, 32, 32))
    sizes = [x.shape[-1]]
    for stage in (net.stage2, net.stage3, net.stage4):
        x = stage(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 16, 8, 4]


def test_the_residual_block_adds_its_input():
    block, x = Residual(4), torch.randn(2, 4, 8, 8)
    branch = block.layer2(block.layer1(x))
    torch.testing.assert_close(block(x), x + branch)


@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_the_output_is_scaled(scale):
    torch.manual_seed(0)
    net = ResNet9((1, 8, 8), 3, channels=(2, 2, 2, 2), output_scale=scale).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        net(x), scale * net.fc(net.pool(net.stage4(net.stage3(net.stage2(net.stage1(x))))).flatten(1))
    )
