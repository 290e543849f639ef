import os
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from boltlab.data import resize as resize_module
from boltlab.data.images import ImageDataModule
from boltlab.data.resize import crop_resize, fit, normalized, shrunk, to_batch

pytestmark = pytest.mark.floats

BOX = (7, 11, 60, 90)  # top, left, height, width


def picture(size=(100, 140), channels=3):
    """uint8 [H,W,C]: edges, gradients and noise."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    smooth = np.stack([np.sin(x / 9) + np.cos(y / 7), (x // 8 + y // 8) % 2 * 1.0, np.sin(y / 3)], -1) * 60 + 128
    noise = np.random.default_rng(0).normal(0, 10, smooth.shape)
    return np.ascontiguousarray((smooth + noise).clip(0, 255).astype(np.uint8)[..., :channels])


def pillow(pixels):
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)


def difference(pixels, image):
    return np.abs(pixels.astype(int) - np.asarray(image, int).reshape(pixels.shape))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (120, 130), (60, 90), (1, 1)])
def test_crop_and_antialiased_resize_are_pillows(size, channels):
    pixels = picture(channels=channels)
    reference = F.resized_crop(pillow(pixels), *BOX, size=list(size), antialias=True)
    away = difference(crop_resize(pixels, BOX, size), reference)
    assert away.max() <= 1 and away.mean() < 0.2


def test_the_kernel_is_torchs_own():
    top, left, height, width = BOX
    tensor = torch.from_numpy(picture()).permute(2, 0, 1)[None, :, top : top + height, left : left + width]
    reference = torch.nn.functional.interpolate(tensor, size=(32, 40), mode="bilinear", antialias=True)
    assert np.array_equal(crop_resize(picture(), BOX, (32, 40)), reference[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_fastest_is_linear_without_antialiasing(channels):
    cv2 = pytest.importorskip("cv2")
    top, left, height, width = BOX
    pixels = picture(channels=channels)
    reference = cv2.resize(pixels[top : top + height, left : left + width], (48, 32))
    assert np.array_equal(crop_resize(pixels, BOX, (32, 48), fastest=True), reference.reshape(32, 48, channels))


@pytest.mark.parametrize("fastest", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (60, 90), (300, 301)])  # (60, 90): nothing to scale
@pytest.mark.parametrize("channels", [1, 3])
def test_out_is_written(size, fastest, channels):
    if fastest:
        pytest.importorskip("cv2")
    pixels = picture(channels=channels)
    pixels.flags.writeable = False  # as those of a memory map
    before = pixels.copy()
    plain = crop_resize(pixels, BOX, size, fastest)
    out = np.zeros((3, *size, channels), np.uint8)
    assert crop_resize(pixels, BOX, size, fastest, out=out[1]).base is out and np.array_equal(out[1], plain)
    assert not out[0].any() and not out[2].any()
    assert np.array_equal(pixels, before) and not np.shares_memory(plain, pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [None, 40, 64])
@pytest.mark.parametrize("got", [(100, 140), (140, 100), (32, 48), (20, 31), (33, 200), (1, 1)])
def test_fit_has_the_geometry_of_the_reference(got, resize, channels):
    pixels = picture(got, channels)
    factor = 1 if resize is None else resize / 32
    cover = [round(32 * factor), round(48 * factor)]  # what the image covers, one side exactly
    size = [max(cover[0], cover[1] * got[0] // got[1]), max(cover[1], cover[0] * got[1] // got[0])]
    image = F.center_crop(F.resize(pillow(pixels), size, antialias=True), [32, 48])
    reference = F.pil_to_tensor(image).permute(1, 2, 0)
    away = difference(fit(pixels, (32, 48), resize), reference)
    assert away.shape == (32, 48, channels)
    assert away.max() <= 1 and away.mean() < 0.2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [None, 256])
@pytest.mark.parametrize("got", [(1, 20_000), (20_000, 1), (2, 9_001), (9_000, 3)])
def test_a_long_narrow_image_takes_no_more_memory_than_what_is_shown(got, resize, channels):
    """What is shown is scaled from its own part of the image, as Pillow does with a box."""
    pixels, size = picture(got, channels), (224, 224)
    tracemalloc.start()
    try:
        found = fit(pixels, size, resize)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    side = 224 / (resize or 224) * min(got)  # of the source that is shown
    top, left = ((had - side) / 2 for had in got)
    reference = pillow(pixels).resize(size, Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    away = difference(found, reference)
    assert away.mean() < 0.6 and away.max() <= 3  # an enlarged pixel's edge, moved by half a pixel


def test_an_image_that_is_not_enlarged_beyond_the_bound_is_scaled_whole(monkeypatch):
    pixels = picture((30, 3_000))
    before = fit(pixels, (224, 224))
    monkeypatch.setattr(resize_module, "MOST_PIXELS", 0)
    away = difference(fit(pixels, (224, 224)), before)
    monkeypatch.setattr(resize_module, "_middle", None)
    monkeypatch.setattr(resize_module, "MOST_PIXELS", 2**24)
    assert np.array_equal(fit(pixels, (224, 224)), before) and away.mean() < 2  # half a pixel of the enlarged image


def test_shrunk_only_shrinks():
    assert shrunk(picture((100, 140)), 50).shape == (50, 70, 3)
    assert shrunk(picture((140, 101)), 50).shape == (69, 50, 3)
    for size in ((50, 140), (20, 30)):
        assert np.array_equal(shrunk(picture(size), 50), picture(size))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads where Linux lists them")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="without AVX2, torch resizes in threads of its own"
)
def test_no_call_starts_threads_of_its_own():
    pixels, images = picture((300, 400)), np.stack([picture((200, 200))] * 4)

    def work():
        crop_resize(pixels, (10, 10, 280, 350), (224, 224))
        crop_resize(pixels, (0, 0, 300, 400), (224, 224))
        fit(pixels, (224, 224), 256)
        to_batch(images)
        done.wait()
        proceed.wait()

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.zeros(1_000_000).add_(1)  # the main thread's own have started
    before = len(os.listdir("/proc/self/task"))
    done, proceed = threading.Barrier(3), threading.Barrier(3)
    threads = [threading.Thread(target=work) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        done.wait()
        assert len(os.listdir("/proc/self/task")) == before + 2
    finally:
        proceed.wait()
        for thread in threads:
            thread.join()
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_contiguous(channels):
    images = np.stack([picture((8, 12), channels), 255 - picture((8, 12), channels)])
    batch = to_batch(images)
    assert batch.is_contiguous() and batch.shape == (2, channels, 8, 12)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [16, 256])  # a large image is normalized in pieces
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("statistics", [1, 3])
def test_normalizing_is_bitwise_that_of_the_data_module(channels, side, channels_last, statistics):
    mean, std = ([0.485, 0.456, 0.406][:statistics], [0.229, 0.224, 0.225][:statistics])
    if channels == 1:
        mean, std = mean[:1], std[:1]
    data = ImageDataModule(input_shape=(channels, side, side), mean=mean, std=std)
    levels = np.resize(np.arange(256, dtype=np.uint8), (1, side, side, 1))
    images = to_batch(np.concatenate([levels] * channels, -1).repeat(9, 0))
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    scale, shift = data._channel_statistics(torch.device("cpu"))
    reference = images.float().mul_(scale).add_(shift)
    assert torch.equal(normalized(images, scale, shift), reference)
    assert normalized(images, scale, shift).stride() == reference.stride()
