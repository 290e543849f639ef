import numpy as np
import pytest
import torch

from project.models.vit import ViT, patch_size_for, sine_positions

pytestmark = pytest.mark.floats


@pytest.mark.parametrize(
    ("size", "patch"), [((28, 28), 4), ((32, 32), 4), ((64, 64), 8), ((96, 64), 8), ((224, 224), 16), ((8, 8), 1)]
)
def test_patch_size_follows_from_the_image(size, patch):
    assert patch_size_for(*size) == patch


@pytest.mark.parametrize(("width", "heads", "count"), [(192, 3, 5_679_400), (384, 6, 21_974_632)])
def test_sizes_are_those_of_deit_without_token_and_learned_positions(width, heads, count):
    with torch.device("meta"):
        net = ViT((3, 224, 224), 1000, width, 12, heads)
    assert sum(p.numel() for p in net.parameters()) == count


def test_positions_tell_every_place_apart():
    positions = sine_positions(8, 5, 32)
    assert positions.shape == (40, 32)
    rates = 10000.0 ** -(np.arange(8) / 7)
    for place, found in enumerate(positions.numpy()):
        y, x = divmod(place, 5)
        right = [np.sin(y * rates), np.cos(y * rates), np.sin(x * rates), np.cos(x * rates)]
        assert found == pytest.approx(np.concatenate(right), abs=1e-5)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    net = ViT((3, 8, 8), 10, 32, 1, 4, patch_size=4)
    ours = net.blocks[0].attention
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        ours.query_key_value.weight.data,
        ours.query_key_value.bias.data,
    )
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.output.weight.data, ours.output.bias.data
    x = torch.randn(2, 7, 32)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


def test_patches_see_where_they_are():
    torch.manual_seed(0)
    net = ViT((1, 8, 8), 10, 32, 2, 4, patch_size=4).eval()
    x = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(net(x), net(x.roll(4, dims=-1)), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 5}, "patch_size 5 does not divide the image of 28×28 pixels"),
        ({"heads": 5}, "width 192 is no"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViT((1, 28, 28), 10, **arguments)
    ((name, text),) = ViT.check_arguments({"input_shape": [1, 28, 28], **arguments})
    assert f"{name} {text}".startswith(message)
    assert ViT.check_arguments({"input_shape": [1, 28, 28]}) == []
