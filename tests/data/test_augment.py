from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchvision.transforms.v2.functional import to_pil_image

from boltlab.data.augment import Augment
from boltlab.data.samplers import own_random_state

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "augment").glob("[!_]*.yaml"))


def preset(name, folder, input_shape, allow_flip=True, *overrides):
    data = f"{{input_shape: {list(input_shape)}, allow_flip: {str(allow_flip).lower()}}}"
    root = (
        f"defaults: [_self_, augment: {name}]\ndata: {data}\nhydra: {{searchpath: ['file://{CONFIGS.as_posix()}']}}\n"
    )
    (folder / "root.yaml").write_text(root, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return instantiate(compose("root", overrides=list(overrides)).augment, _convert_="all")


def image(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 48, 64)])
def test_every_preset_keeps_kind_and_size(name, shape, tmp_path):
    augment = preset(name, tmp_path, shape)
    assert augment.active == (name != "none")
    tensor, pil = image(*shape), to_pil_image(image(*shape))
    with own_random_state() as seed:
        for number in range(25):  # enough for every operation of the policies to have its turn
            seed(number)
            assert (augment(tensor).shape, augment(tensor).dtype) == (shape, torch.uint8)
            assert (augment(pil).size, augment(pil).mode) == (pil.size, pil.mode)
        changed = sum(not torch.equal(augment(tensor), tensor) for _ in range(10))
    assert (changed > 0) == augment.active


def test_none_returns_the_image_itself(tmp_path):
    tensor = image(1, 28, 28)
    assert preset("none", tmp_path, (1, 28, 28))(tensor) is tensor


def test_parameters_are_reachable_from_the_command_line(tmp_path):
    augment = preset("basic", tmp_path, (3, 32, 32), True, "augment.padding=0", "augment.flip_probability=1")
    tensor = image(3, 32, 32)
    assert torch.equal(augment(tensor), tensor.flip(-1))


def test_data_that_may_not_be_mirrored_never_is(tmp_path):
    for name in PRESETS:
        augment = preset(name, tmp_path, (1, 28, 28), False, "augment.flip_probability=1")
        assert not any("Flip" in type(step).__name__ for step in augment.steps), name
    assert any("Flip" in type(step).__name__ for step in preset("basic", tmp_path, (1, 28, 28)).steps)


def test_flips_half_of_the_images():
    augment, tensor = Augment(input_shape=(1, 8, 8), flip_probability=0.5), image(1, 8, 8)
    with own_random_state() as seed:
        seed(0)
        flips = sum(torch.equal(augment(tensor), tensor.flip(-1)) for _ in range(400))
    assert 150 < flips < 250


def test_padded_crop_moves_by_at_most_the_padding():
    tensor = torch.zeros(1, 16, 16, dtype=torch.uint8)
    tensor[0, 8, 8] = 255
    augment = Augment(input_shape=(1, 16, 16), crop="padded")
    with own_random_state() as seed:
        seed(0)
        places = {tuple(augment(tensor).nonzero()[0].tolist()) for _ in range(500)}
    assert places == {(0, y, x) for y in range(6, 11) for x in range(6, 11)}  # an eighth of 16 either way


def test_check_arguments():
    found = Augment.check_arguments({"flip_probability": 1.5, "magnitude": 31, "fill": -1, "padding": "auto"})
    assert [name for name, _ in found] == ["flip_probability", "fill", "magnitude"]
