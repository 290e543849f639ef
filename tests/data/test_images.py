from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from boltlab.data.augment import Augment
from boltlab.data.digits import Digits
from boltlab.data.images import AugmentAndFit, Fit, ImageDataModule


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 40)])
@pytest.mark.parametrize("size", [(28, 28), (50, 31), (10, 80), (1, 1)])
def test_fit_makes_the_input_shape_of_any_image(shape, size):
    for image in (noise(3, *size), noise(1, *size), Image.new("L", size[::-1]), Image.new("RGB", size[::-1])):
        assert Fit(shape)(image).shape == shape
    assert Fit(shape)(noise(5, 3, *size)).shape == (5, *shape)


def test_fit_leaves_an_image_of_the_right_size_as_it_is():
    image = noise(3, 32, 32)
    assert torch.equal(Fit((3, 32, 32))(image), image)
    assert torch.equal(Fit((3, 28, 28))(noise(1, 28, 28)), noise(1, 28, 28).expand(3, 28, 28))


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (224, 224), (100, 180)])
def test_fit_is_the_standard_evaluation_crop(size):
    image = v2.functional.to_pil_image(noise(3, *size))
    standard = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor()])
    assert torch.equal(Fit((3, 224, 224), resize=256)(image), standard(image))


def test_an_augmentation_that_crops_to_size_sees_the_stored_image():
    sizes = []

    class Spy(Augment):
        def __call__(self, image):
            sizes.append(image.size)
            return super().__call__(image)

    image = Image.new("RGB", (300, 400))
    for crop, size in (("resized", (300, 400)), ("padded", None)):
        augment = Spy(input_shape=(3, 224, 224), crop=crop)
        assert AugmentAndFit(augment, Fit((3, 224, 224), resize=256))(image).shape == (3, 224, 224)
        assert size is None or sizes == [size]


def test_normalize_and_back_is_exact_for_every_pixel_value():
    data = ImageDataModule(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    normalized = data.normalize(images)
    reference = v2.functional.normalize(images / 255, data.mean, data.std)
    torch.testing.assert_close(normalized, reference)
    assert torch.equal(data.denormalize(normalized), images)
    assert torch.equal(data.denormalize(torch.full((1, 3, 2, 2), 99.0)), torch.full((1, 3, 2, 2), 255).byte())


def test_the_hook_normalizes_uint8_and_nothing_else():
    data = Digits(mean=[0.0], std=[1.0])
    x, y = data.on_after_batch_transfer((torch.full((2, 1, 28, 28), 255).byte(), torch.tensor([1, 2])), 0)
    assert (x.dtype, x.mean().item(), y.tolist()) == (torch.float32, 1.0, [1, 2])
    again, _ = data.on_after_batch_transfer((x, y), 0)
    assert again is x
    data.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(convert_input=lambda x: x.double()))
    x, _ = data.on_after_batch_transfer([torch.zeros(2, 1, 28, 28).byte(), y], 0)
    assert x.dtype == torch.float64


def test_another_input_shape():
    data = Digits(input_shape=(3, 32, 32))
    x, _ = next(iter(data.val_dataloader()))
    assert x.shape == (64, 3, 32, 32)
    assert data.normalize(x).shape == (64, 3, 32, 32)  # one mean for all channels
    assert data.eval_transform(Image.new("RGBA", (50, 60))).shape == (3, 32, 32)
    assert Digits().eval_transform(Image.new("RGB", (50, 60))).shape == (1, 28, 28)


def test_check_arguments():
    arguments = {"input_shape": [2, 28, 28], "mean": [0.5, 0.5, 0.5], "std": [0.0], "class_names": ["a", "b"],
                 "num_classes": 3, "resize": 20, "batch_size": 0}  # fmt: skip
    found = dict(ImageDataModule.check_arguments(arguments))
    assert set(found) == {"input_shape", "mean", "std", "num_classes", "resize", "batch_size"}
    assert found["num_classes"] == "3, but class_names lists 2"
    assert ImageDataModule.check_arguments({"input_shape": [3, 32, 32], "mean": [0.5], "num_classes": "auto"}) == []
