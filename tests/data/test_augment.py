import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from boltlab.data.augment import Augment, _windows_by_index
from boltlab.data.samplers import Draws

pytestmark = pytest.mark.floats

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "augment").glob("[!_]*.yaml"))
OPERATIONS = {
    "crop": {"crop": "padded"},
    "flip": {"flip_probability": 0.5},
    "affine": {"degrees": 20, "translate": 0.2, "zoom": 0.2, "shear": 10},
    "colour": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2},
    "randaugment": {"policy": "randaugment"},
    "trivialaugment": {"policy": "trivialaugment"},
    "cutout": {"cutout": 7},
    "erasing": {"erase_probability": 0.5},
}


def preset(name, folder, input_shape, allow_flip=True, *overrides):
    data = f"{{input_shape: {list(input_shape)}, allow_flip: {str(allow_flip).lower()}}}"
    root = (
        f"defaults: [_self_, augment: {name}]\ndata: {data}\nhydra: {{searchpath: ['file://{CONFIGS.as_posix()}']}}\n"
    )
    (folder / "root.yaml").write_text(root, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return instantiate(compose("root", overrides=list(overrides)).augment, _convert_="all")


def images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws(count, epoch=0):
    return Draws(0, epoch, torch.arange(count))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 48, 64)])
def test_every_preset_keeps_kind_and_size(name, shape, tmp_path):
    augment = preset(name, tmp_path, shape)
    assert augment.active == (name != "none")
    before = images(40, *shape)
    after = augment(before.clone(), draws(40))
    assert (after.shape, after.dtype, after.is_contiguous()) == (before.shape, torch.uint8, True)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (changed > 10) == ((augment.active and not augment.resizes) or augment.flip_probability > 0)


@pytest.mark.parametrize("options", OPERATIONS.values(), ids=list(OPERATIONS))
def test_an_image_comes_out_the_same_in_any_batch(options):
    augment, before = Augment(input_shape=(3, 16, 16), **options), images(20, 3, 16, 16)
    whole = augment(before.clone(), draws(20))
    assert not torch.equal(whole, before)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for part in (order[:1], order[1:8], order[8:]):
        assert torch.equal(augment(before[part], Draws(0, 0, part)), whole[part])
    assert not torch.equal(augment(before.clone(), draws(20, epoch=1)), whole)


def test_operations_do_not_move_each_others_draws():
    alone = Augment(input_shape=(3, 16, 16), cutout=6, fill=255)
    both = Augment(input_shape=(3, 16, 16), cutout=6, fill=255, brightness=0.5, flip_probability=1.0)
    black = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)  # neither a flip nor brightness changes black
    assert torch.equal(alone(black.clone(), draws(20)), both(black.clone(), draws(20)))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    for options in OPERATIONS.values():
        Augment(input_shape=(3, 16, 16), **options)(images(4, 3, 16, 16), draws(4))
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_are_reachable_from_the_command_line(tmp_path):
    augment = preset("basic", tmp_path, (3, 32, 32), True, "augment.padding=0", "augment.flip_probability=1")
    before = images(3, 3, 32, 32)
    assert torch.equal(augment(before.clone(), draws(3)), before.flip(-1))


def test_data_that_may_not_be_mirrored_never_is(tmp_path):
    for name in PRESETS:
        augment = preset(name, tmp_path, (1, 28, 28), False, "augment.flip_probability=1")
        assert augment.flip_probability == 0, name
    assert preset("basic", tmp_path, (1, 28, 28)).flip_probability == 0.5


def test_flips_half_of_the_images():
    augment, before = Augment(input_shape=(1, 8, 8), flip_probability=0.5), images(400, 1, 8, 8)
    after = augment(before.clone(), draws(400))
    flipped = (after == before.flip(-1)).flatten(1).all(1)
    assert 150 < flipped.sum() < 250
    assert torch.equal(after[~flipped], before[~flipped])


def test_padded_crop_moves_by_at_most_the_padding():
    before = torch.zeros(500, 1, 16, 16, dtype=torch.uint8)
    before[:, 0, 8, 8] = 255
    after = Augment(input_shape=(1, 16, 16), crop="padded")(before, draws(500))
    places = {tuple(place) for place in after[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}  # an eighth of 16 either way


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "symmetric"])
def test_every_form_of_the_crop_is_torchvisions(mode):
    before, chosen = images(30, 3, 9, 12), torch.arange(30).flip(0)[:20]
    augment = Augment(input_shape=(3, 9, 12), crop="padded", padding=4, padding_mode=mode, fill=77)
    numbers = Draws(0, 0, chosen).uniforms(0, 2) * 9
    corners = numbers.long()
    expected = torch.stack([
        F.pad(before[image], [4] * 4, fill=77, padding_mode=mode)[:, top : top + 9, left : left + 12]
        for image, (top, left) in zip(chosen.tolist(), corners.tolist(), strict=True)
    ])  # fmt: skip
    assert torch.equal(augment(before[chosen], Draws(0, 0, chosen)), expected)
    assert torch.equal(augment(before[chosen], Draws(0, 0, chosen)), expected)  # its memory is used again
    assert torch.equal(_windows_by_index(before[chosen], *corners.T, 4, mode, 77), expected)  # the form of a GPU


@pytest.mark.parametrize(
    "options",
    [{"degrees": 40}, {"zoom": 0.4}, {"degrees": 30, "zoom": 0.3}, {"shear": 30}, {"degrees": 60, "shear": 20}],
)
def test_affine_is_torchvisions(options):
    before = images(12, 3, 20, 30)
    after = Augment(input_shape=(3, 20, 30), fill=50, **options)(before, draws(12))
    numbers = 2 * draws(12).uniforms(3, 5) - 1
    for image, mine, (angle, _, _, zoom, shear) in zip(before, after, numbers.tolist(), strict=True):
        expected = F.affine(
            image.float() - 50,  # torchvision uncovers 0
            angle=angle * options.get("degrees", 0),
            translate=[0, 0],
            scale=1 + zoom * options.get("zoom", 0),
            shear=[shear * options.get("shear", 0), 0],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        assert (mine - (expected + 50)).abs().max() <= 1


def test_shifts_by_whole_pixels_are_exact():
    augment = Augment(input_shape=(1, 8, 8), translate=0.5)
    numbers = torch.tensor([[0.0, 0.25, -0.5, 0.0, 0.0]])  # of 0.5: an eighth to the right, a quarter up

    class Fixed:
        def uniforms(self, first, count):
            return (numbers + 1) / 2

    before = images(1, 1, 8, 8)
    after = augment._affine(before, Fixed())
    assert torch.equal(after[0, 0, :6, 1:], before[0, 0, 2:, :7])
    assert after[0, 0, 6:].sum() == 0
    assert after[0, 0, :, 0].sum() == 0


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(name):
    before = images(12, 3, 10, 10) // 2 + 40  # nothing is clipped on the way
    after = Augment(input_shape=(3, 10, 10), **{name: 0.5})(before, draws(12))
    column = ["brightness", "contrast", "saturation"].index(name)
    factors = 1 + 0.5 * (2 * draws(12).uniforms(10, 4)[:, column] - 1)
    adjust = getattr(F, f"adjust_{name}")
    for image, mine, factor in zip(before, after, factors.tolist(), strict=True):
        expected = adjust(image.float() / 255, factor) * 255
        assert (mine.float() - expected).abs().max() <= 1.5
    grey = images(5, 1, 10, 10)
    assert Augment(input_shape=(1, 10, 10), **{name: 0.5})(grey, draws(5)).shape == grey.shape


def test_hue_keeps_the_luma_and_grey_pixels():
    augment = Augment(input_shape=(3, 10, 10), hue=0.5)
    grey = images(6, 1, 10, 10).expand(6, 3, 10, 10).contiguous()
    assert (augment(grey, draws(6)).int() - grey.int()).abs().max() <= 1
    colours = images(6, 3, 10, 10) // 4 + 96
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    after = augment(colours, draws(6))
    assert not torch.equal(after, colours)
    assert ((after * weights).sum(1) - (colours * weights).sum(1)).abs().max() < 1


def test_cutout_paints_a_square_around_any_pixel():
    white = torch.full((400, 1, 12, 12), 255, dtype=torch.uint8)
    after = Augment(input_shape=(1, 12, 12), cutout=5, fill=9)(white, draws(400))
    painted = (after == 9).flatten(1).sum(1)
    assert painted.max() == 25
    assert painted.min() == 9  # the centre in a corner
    assert set(after.unique().tolist()) == {9, 255}
    assert (after == 9).any(0).all()


def test_erasing_takes_2_to_33_percent_of_some():
    white = torch.full((600, 1, 40, 40), 255, dtype=torch.uint8)
    after = Augment(input_shape=(1, 40, 40), erase_probability=0.25)(white, draws(600))
    areas = (after == 0).flatten(1).sum(1) / 1600
    assert 0.2 < (areas > 0).float().mean() < 0.3
    erased = areas[areas > 0]
    assert erased.min() > 0.01
    assert 0.28 < erased.max() < 0.35


def test_box_is_that_of_random_resized_crop():
    augment, count = Augment(input_shape=(3, 224, 224), crop="resized"), 2000
    boxes = torch.tensor([augment.box(numbers, 300, 400) for numbers in augment.boxes(draws(count))]).float()
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(224)
    image = torch.empty(3, 300, 400, dtype=torch.uint8)
    drawn = [reference.make_params([image]) for _ in range(count)]
    for mine, name in ((height, "height"), (width, "width"), (top, "top"), (left, "left")):
        theirs = torch.tensor([float(d[name]) for d in drawn])
        assert abs(mine.mean() - theirs.mean()) < 4 * theirs.std() * math.sqrt(2 / count), name
        assert abs(mine.std() / theirs.std() - 1) < 0.08, name


def test_box_of_an_image_that_is_too_narrow():
    augment = Augment(input_shape=(3, 8, 8), crop="resized", min_area=1.0)
    assert augment.box([0.5] * 22, 100, 10) == (43, 0, 13, 10)
    assert augment.box([0.5] * 22, 10, 100) == (0, 43, 10, 13)


def test_check_arguments():
    found = Augment.check_arguments({"flip_probability": 1.5, "magnitude": 31, "fill": -1, "padding": "auto"})
    assert [name for name, _ in found] == ["flip_probability", "fill", "magnitude"]
    mirrored = {"input_shape": [1, 8, 8], "crop": "padded", "padding_mode": "reflect", "padding": 8}
    assert [name for name, _ in Augment.check_arguments(mirrored)] == ["padding"]
