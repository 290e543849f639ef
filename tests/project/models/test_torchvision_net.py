import urllib.error

import pytest
import torch
import torchvision.models

from boltlab.ground.errors import UserError
from project.models.torchvision_net import TorchvisionNet

pytestmark = pytest.mark.floats

FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11",
    "vgg11_bn", "vit_b_16", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (4, 240, 300)])
def test_every_family_takes_every_size_and_number_of_channels(name, shape):
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnets compute their widths with tensors
        net = TorchvisionNet(name, shape, 7)
    net.to("meta")
    # In training mode, where auxiliary outputs would show.
    assert net(torch.empty(2, *shape, device="meta")).shape == (2, 7)


def test_no_family_is_left_out():
    def family(name):
        return name.rstrip("0123456789_").split("_")[0].rstrip("0123456789")

    names = torchvision.models.list_models(module=torchvision.models)
    assert {family(n) for n in names} == {family(n) for n in FAMILIES}


def test_names_are_checked_with_a_suggestion():
    ((argument, message),) = TorchvisionNet.check_arguments({"name": "restnet18"})
    assert argument == "name"
    assert message.startswith("torchvision has no classification net 'restnet18'; did you mean 'resnet18'")
    with pytest.raises(ValueError, match="did you mean 'vgg11'"):
        TorchvisionNet("vgg111", (3, 32, 32), 10)
    assert TorchvisionNet.check_arguments({"name": "vgg11"}) == []


def fake_weights(monkeypatch, net):
    """Has torchvision give the state of `net` where it would fetch weights."""
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: net.state_dict())


@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_fill_all_but_the_head(monkeypatch, channels):
    torch.manual_seed(0)
    source = torchvision.models.squeezenet1_1()
    fake_weights(monkeypatch, source)
    net = TorchvisionNet("squeezenet1_1", (channels, 64, 64), 10, pretrained=True)
    head = net.net.classifier[1].weight.clone()
    net.load_pretrained()
    assert torch.equal(net.net.features[3].squeeze.weight, source.features[3].squeeze.weight)
    assert torch.equal(net.net.classifier[1].weight, head)
    gray = torch.randn(2, 1, 64, 64)
    found = net.net.features(gray.expand(-1, channels, -1, -1))
    assert torch.allclose(found, source.features(gray.expand(-1, 3, -1, -1)), atol=1e-4)


def test_all_thousand_classes_keep_the_head(monkeypatch):
    source = torchvision.models.squeezenet1_1()
    fake_weights(monkeypatch, source)
    net = TorchvisionNet("squeezenet1_1", (3, 64, 64), 1000, pretrained=True)
    net.load_pretrained()
    assert torch.equal(net.net.classifier[1].weight, source.classifier[1].weight)


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b1", "efficientnet_v2_l"])
def test_how_the_images_of_the_weights_were_made(monkeypatch, name):
    with torch.device("meta"):
        net = TorchvisionNet(name, (3, 64, 64), 10, pretrained=True)
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: net.net)
    shown = repr(torchvision.models.get_model_weights(name).DEFAULT.transforms())
    for key, value in net.load_pretrained().items():
        assert f"{key}={value}" in shown or f"{key}=InterpolationMode.{str(value).upper()}" in shown
    assert net.load_pretrained().keys() == {"mean", "std", "interpolation"}


def test_building_never_fetches_and_fetching_without_a_network_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", refuse)
    net = TorchvisionNet("squeezenet1_1", (3, 32, 32), 10, pretrained=True)
    with pytest.raises(UserError) as error:
        net.load_pretrained()
    text = str(error.value)
    assert "weights of squeezenet1_1 cannot be fetched from https://download.pytorch.org/models/squeezenet1_1" in text
    assert "checkpoints/squeezenet1_1" in text and "model.net.pretrained=false" in text
    TorchvisionNet("squeezenet1_1", (3, 32, 32), 10).load_pretrained()  # not asked for: nothing to do
