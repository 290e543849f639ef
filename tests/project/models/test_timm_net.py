import pytest
import torch

from boltlab.ground.errors import UserError
from boltlab.optim.build import decayed_parameters
from project.models import timm_net
from project.models.timm_net import TimmNet

pytestmark = pytest.mark.floats

with_timm = pytest.mark.skipif(timm_net.timm is None, reason="the extra timm is not installed")


@with_timm
@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet18", (1, 28, 28)), ("vit_tiny_patch16_224", (3, 32, 32)), ("resnet18.a1_in1k", (4, 64, 48))],
)
def test_channels_classes_and_sizes_are_filled_in(name, shape):
    net = TimmNet(name, shape, 7).eval()
    with torch.no_grad():
        assert net(torch.randn(2, *shape)).shape == (2, 7)


@with_timm
def test_positions_and_tokens_do_not_decay():
    decays = {name: decays for name, _, decays in decayed_parameters(TimmNet("vit_tiny_patch16_224", (3, 32, 32), 7))}
    assert not decays["net.pos_embed"] and not decays["net.cls_token"]
    assert decays["net.head.weight"] and not decays["net.head.bias"]


@with_timm
def test_names_are_checked_with_a_suggestion():
    ((argument, message),) = TimmNet.check_arguments({"model_name": "convnxt_tiny"})
    assert argument == "model_name"
    assert message.startswith("timm has no classification net 'convnxt_tiny'; did you mean 'convnext_tiny'")
    assert TimmNet.check_arguments({"model_name": "resnet18.a1_in1k"}) == []


@with_timm
def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="inception_v3 cannot take images of 28×28 pixels"):
        TimmNet("inception_v3", (1, 28, 28), 10)


@with_timm
def test_fetching_without_a_network_says_what_to_do(monkeypatch):
    create = timm_net.timm.create_model

    def offline(*arguments, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no network")
        return create(*arguments, **options)

    monkeypatch.setattr(timm_net.timm, "create_model", offline)
    net = TimmNet("resnet18", (3, 32, 32), 10, pretrained=True)
    with pytest.raises(UserError, match=r"weights of resnet18 cannot be fetched \(ConnectionError: no network\)"):
        net.load_pretrained()


@with_timm
def test_pretrained_weights_are_those_that_timm_gives(monkeypatch):
    create = timm_net.timm.create_model
    source = create("resnet18", in_chans=1, num_classes=10)
    net = TimmNet("resnet18", (1, 32, 32), 10, pretrained=True)
    monkeypatch.setattr(timm_net.timm, "create_model", lambda *_, **__: source)
    cfg = source.pretrained_cfg
    assert net.load_pretrained() == {name: cfg[name] for name in ("mean", "std", "interpolation")}
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.net.state_dict().items())


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setattr(timm_net, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'boltlab\[timm\]'"):
        TimmNet("resnet18", (3, 32, 32), 10)
    assert TimmNet.check_arguments({"model_name": "resnet18"}) == [("model_name", timm_net.MISSING)]
