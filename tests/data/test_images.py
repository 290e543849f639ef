from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from boltlab.data.augment import Augment
from boltlab.data.images import ImageDataModule, fit_images
from boltlab.data.loader import TensorData
from boltlab.data.resize import fit
from project.data.digits import Digits

pytestmark = pytest.mark.floats


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 40)])
@pytest.mark.parametrize("size", [(28, 28), (50, 31), (10, 80), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_fitted(shape, size, channels):
    fitted = fit_images(noise(5, channels, *size), shape)
    assert fitted.shape == (5, *shape)
    assert fitted.is_contiguous()


def test_images_of_the_right_size_stay_as_they_are():
    images = noise(2, 3, 32, 32)
    assert fit_images(images, (3, 32, 32)) is images
    assert torch.equal(fit_images(noise(2, 1, 28, 28), (3, 28, 28)), noise(2, 1, 28, 28).expand(2, 3, 28, 28))


@pytest.mark.parametrize(("size", "resize"), [((60, 80), None), ((60, 80), 40), ((100, 52), 50), ((20, 36), 32)])
def test_a_batch_in_memory_is_fitted_as_a_file_is(size, resize):
    images = noise(3, 3, *size)
    together = fit_images(images, (3, 32, 32), resize)
    for image, fitted in zip(images, together, strict=True):
        alone = fit(image.permute(1, 2, 0).contiguous().numpy(), (32, 32), resize)
        assert torch.equal(fitted.permute(1, 2, 0), torch.from_numpy(alone))


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
    Image.new("RGBA", (50, 60)).save("file.png")
    assert data.eval_pixels("file.png").shape == (3, 32, 32)
    assert Digits().eval_pixels("file.png").shape == (1, 28, 28)


@pytest.mark.parametrize(("stored", "wanted"), [(1, 3), (3, 1)])
def test_a_resized_crop_of_images_in_memory_with_other_channels(stored, wanted):
    class Grey(Digits):
        def load(self, split):
            return TensorData(torch.full((8, stored, 28, 28), 77, dtype=torch.uint8), torch.arange(8))

    shape = (wanted, 20, 20)
    data = Grey(input_shape=shape, augment=Augment(input_shape=shape, crop="resized"))
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (8, *shape)
    assert ((x.int() - 77).abs() <= 1).all()  # torchvision's grey is rounded down


def test_check_arguments():
    arguments = {"input_shape": [2, 28, 28], "mean": [0.5, 0.5, 0.5], "std": [0.0], "class_names": ["a", "b"],
                 "num_classes": 3, "resize": 20, "batch_size": 0}  # fmt: skip
    found = dict(ImageDataModule.check_arguments(arguments))
    assert set(found) == {"input_shape", "mean", "std", "num_classes", "resize", "batch_size"}
    assert found["num_classes"] == "3, but class_names lists 2"
    assert ImageDataModule.check_arguments({"input_shape": [3, 32, 32], "mean": [0.5], "num_classes": "auto"}) == []
