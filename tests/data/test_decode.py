import importlib.util
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from waiting import HANG

from boltlab.data.decode import MAX_PIXELS, check_decode, jpeg_bytes, plain_jpeg, read_image, read_pixels
from boltlab.ground.errors import DataError, UserError

needs_simplejpeg = pytest.mark.skipif(importlib.util.find_spec("simplejpeg") is None, reason="simplejpeg is missing")


def gradient(mode="RGB", size=(24, 16)):
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    grey = np.tile(ramp, (size[1], 1))
    bands = {"L": [grey], "RGB": [grey, 255 - grey, np.full_like(grey, 60)]}[mode]
    return Image.fromarray(np.stack(bands, -1).squeeze())


def pixels(path, channels=3):
    image = read_image(path, channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    return np.asarray(image).astype(int)


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a b=c,d.png", "图像 é.png", "a.tif", "a.bmp", "a.ppm"])
def test_lossless_formats_and_any_file_name(tmp_path, name):
    gradient().save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.array_equal(pixels(tmp_path / name), np.asarray(gradient()))


def test_jpeg_rgb_grey_and_cmyk(tmp_path):
    gradient().save(tmp_path / "rgb.jpg", quality=95)
    gradient("L").save(tmp_path / "grey.jpg", quality=95)
    gradient().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "rgb.jpg") - np.asarray(gradient())).mean() < 4
    assert np.abs(pixels(tmp_path / "cmyk.jpg") - np.asarray(gradient())).mean() < 4
    grey = pixels(tmp_path / "grey.jpg")
    assert np.abs(grey - np.asarray(gradient("L"))[..., None]).mean() < 2
    assert pixels(tmp_path / "rgb.jpg", channels=1).shape == (16, 24)


def test_palette(tmp_path):
    image = gradient().quantize(200)
    image.save(tmp_path / "p.png")
    assert np.array_equal(pixels(tmp_path / "p.png"), np.asarray(image.convert("RGB")))


def test_bilevel(tmp_path):
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "1.png")
    assert np.array_equal(pixels(tmp_path / "1.png", 1), np.eye(8) * 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_what_is_transparent_lies_over_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.putpixel((1, 0), 1)
        palette.save(path, transparency=1)
    elif mode == "RGB":
        plain = Image.new("RGB", (2, 1), (0, 0, 0))
        plain.putpixel((1, 0), (9, 9, 9))
        plain.save(path, transparency=(9, 9, 9))
    elif mode == "PA":
        image.convert("RGBA").save(path)
    else:
        image.convert(mode).save(path)
    assert pixels(path).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert pixels(path, 1).tolist() == [[0, 255]]


def test_half_transparent_is_blended(tmp_path):
    Image.new("RGBA", (1, 1), (200, 0, 0, 128)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[227, 127, 127]]]


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 257, 128 * 257, 255 * 257, 65535, 300]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert pixels(tmp_path / name, 1).tolist() == [[0, 1, 128, 255, 255, 1]]
        assert pixels(tmp_path / name).shape == (1, 6, 3)


@pytest.mark.parametrize("values", [np.array([[70000]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)])
def test_pixels_of_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="have no known range"):
        read_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = gradient()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that EXIF's orientation undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(upright))


def test_broken_exif_does_not_spoil_good_pixels(tmp_path):
    gradient().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0nonsense")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(gradient()))


def jpeg(size=(64, 64)):
    buffer = io.BytesIO()
    gradient(size=size).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "this is a web page or XML, not an image"),
        (b"not an image at all", "not an image, or of an unknown format"),
        (jpeg()[:400], "Truncated"),
        (jpeg()[:-40], "truncated"),
        (png_header(20_000, 15_000), "20000 x 15000 pixels are refused .*: data.max_pixels=200000000 is the limit"),
        (png_header(100_000, 100_000), "pixels are refused"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a b.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        read_image(path, 3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(DataError, match=str(tmp_path.name)):
        read_image(tmp_path, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_at_the_limit_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    gradient().save(path)
    for decode in ("pillow", "fast"):
        assert read_pixels(path, 3, decode, 24 * 16).shape == (16, 24, 3)
        with pytest.raises(DataError, match="24 x 16 pixels are refused .*: data.max_pixels=383 is the limit"):
            read_pixels(path, 3, decode, 24 * 16 - 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(12_000, 9_000), (16_320, 12_240)])
def test_the_photographs_of_phones_are_read(tmp_path, size):
    """Of 108 and 200 million pixels: Pillow by itself warns of the first and refuses the second."""
    Image.new("L", size, 77).save(tmp_path / "a.png", compress_level=1)
    found = read_pixels(tmp_path / "a.png", 1, "pillow")
    assert found.shape == (size[1], size[0], 1) and found.min() == found.max() == 77
    assert size[0] * size[1] <= MAX_PIXELS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files here")
@pytest.mark.parametrize("decode", ["pillow", "fast"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "socket"])
def test_what_has_no_end_is_refused_at_once(tmp_path, kind, decode):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))
    else:
        path.symlink_to(kind)
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + "(this is a pipe or a device|No such device)"):
        read_pixels(path, 3, decode)


def test_a_huge_file_is_not_read_whole(tmp_path):
    """A JPEG's head and a terabyte of nothing behind it."""
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(encoded()[:600])
        file.truncate(1 << 40)
    assert jpeg_bytes(tmp_path / "a.jpg") == b""


def photograph(size=(75, 50)):
    """Smooth colours and some noise, so that chroma is upsampled and every coefficient is in use."""
    height, width = size[1], size[0]
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([np.sin(x / 9) + np.cos(y / 7), np.cos(x / 5 + y / 11), np.sin(y / 3)], -1) * 60 + 128
    noise = np.random.default_rng(0).normal(0, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def encoded(image=None, file_format="JPEG", **options):
    buffer = io.BytesIO()
    (photograph() if image is None else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


PLAIN = {
    "4:2:0": encoded(),
    "4:2:2": encoded(subsampling=1),
    "4:4:4": encoded(subsampling=0),
    "progressive": encoded(progressive=True),
    "restart markers": encoded(restart_marker_blocks=2),
    "optimized": encoded(optimize=True, quality=95),
    "grey": encoded(photograph().convert("L")),
    "one pixel": encoded(photograph((1, 1))),
    "comment": encoded(comment=b"hello"),
    "upright": encoded(exif=oriented(1)),
    "exif without orientation": encoded(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "junk behind the end": encoded() + b"junk",
}
OTHERS = {
    "rotated": encoded(exif=oriented(6)),
    "rotated by XMP": encoded(xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    "broken EXIF": encoded(exif=b"Exif\0\0II*\0\x01\x12nonsense"),
    "CMYK": encoded(photograph().convert("CMYK")),
    "RGB inside": encoded(keep_rgb=True),
    "PNG": encoded(file_format="PNG"),
    "WebP": encoded(file_format="WEBP"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("decode", ["pillow", "fast", "fastest"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_every_way_reads_the_same_pixels(tmp_path, name, channels, decode):
    (tmp_path / "a.jpg").write_bytes((PLAIN | OTHERS)[name])
    pixels = read_pixels(tmp_path / "a.jpg", channels, decode)
    reference = np.asarray(read_image(tmp_path / "a.jpg", channels))
    assert np.array_equal(pixels, reference.reshape(pixels.shape)) and pixels.shape[2] == channels
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable


@needs_simplejpeg
def test_only_plain_jpegs_go_past_pillow(monkeypatch):
    assert [name for name, data in PLAIN.items() if plain_jpeg(data, 3) is None] == []
    assert [name for name, data in OTHERS.items() if plain_jpeg(data, 3) is not None] == []
    monkeypatch.setattr("simplejpeg.decode_jpeg", None)  # a bomb is refused by its header
    assert plain_jpeg(encoded(), 3, 75 * 50 - 1) is None


def pixels_or_reason(path, decode, channels=3):
    try:
        return read_pixels(path, channels, decode)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["cut", "flipped", "inserted"])
def test_a_damaged_file_is_judged_by_pillow(tmp_path, kind):
    random = np.random.default_rng(0)
    path = tmp_path / "a.jpg"
    for _ in range(40):
        data = bytearray(PLAIN[("4:2:0", "progressive", "restart markers")[random.integers(3)]])
        at = int(random.integers(len(data)))
        if kind == "cut":
            data = data[:at]
        elif kind == "flipped":
            data[at] ^= 1 << int(random.integers(8))
        else:
            data[at:at] = random.bytes(9)
        path.write_bytes(data)
        expected, got = (pixels_or_reason(path, decode) for decode in ("pillow", "fast"))
        assert np.array_equal(got, expected)


def test_every_way_names_what_is_no_file(tmp_path):
    for decode in ("pillow", "fast"):
        with pytest.raises(DataError, match="No such file"):
            read_pixels(tmp_path / "none.jpg", 3, decode)
        with pytest.raises(DataError, match=str(tmp_path.name)):
            read_pixels(tmp_path, 3, decode)


# -- files that somebody made to do harm, or a broken disk


def with_size(data, at, form, *size):
    """The file with another size in its header."""
    return data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form) :]


def tiff_of(width, height, compression):
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1), (277, 3, 1)]
    tags += [(273, 4, 200), (278, 4, height), (279, 4, 40)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0"
    return head.ljust(200, b"\0") + zlib.compress(b"\0" * 20_000)


def png_with_text(size):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * size))
    data = encoded(file_format="PNG")
    return data[:33] + text + data[33:]


def gif_with_frame(size):
    """A screen of one pixel that holds a frame of size x size."""
    data = encoded(photograph((8, 8)).quantize(4), "GIF")
    at = data.index(b",\0\0\0\0")
    return with_size(with_size(data, 6, "<HH", 1, 1), at + 5, "<HH", size, size)


HUGE = 60_000
BOMBS = {
    "png": png_header(HUGE, HUGE),
    "png, below the limit": png_header(9_400, 9_500),
    "png text": png_with_text(300 << 20),
    "gif": with_size(encoded(file_format="GIF"), 6, "<HH", 65_535, 65_535),
    "gif, its frame": gif_with_frame(65_535),
    "webp lossless": b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f\xff\xff\xff\x0f" + b"\0" * 15,
    "webp extended": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\xff\0" * 2 + b"ANMF\0\0\0\0",
    "bmp": with_size(encoded(file_format="BMP"), 18, "<ii", HUGE, HUGE),
    "tiff": tiff_of(HUGE, HUGE, 8),
    "tiff, raw": tiff_of(2**31 - 1, 1, 1),
    "tga": with_size(encoded(file_format="TGA"), 12, "<HH", 65_535, 65_535),
    "ppm": b"P6 99999 99999 255\n" + b"\0" * 50,
    "jpeg": encoded().replace(b"\0\x11\x08" + struct.pack(">HH", 50, 75), b"\0\x11\x08\xff\xff\xff\xff", 1),
}


LIMITED = """
import resource, sys, warnings
from pathlib import Path
from boltlab.data.decode import read_pixels
from boltlab.ground.errors import DataError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
warnings.simplefilter("error")
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = f"{read_pixels(path, 3, 'fast').shape}"
    except DataError as error:
        text = str(error)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10} {text}", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set for Linux")
def test_a_decompression_bomb_is_refused_in_little_memory_and_time(tmp_path):
    for number, data in enumerate(BOMBS.values()):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    paths = [str(tmp_path / f"{number}.jpg") for number in range(len(BOMBS))]
    command = [sys.executable, "-c", LIMITED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    answers = dict(zip(BOMBS, done.stdout.splitlines(), strict=True))
    for (name, line), path in zip(answers.items(), paths, strict=True):
        megabytes, text = line.split(" ", 1)
        assert int(megabytes) < 100, (name, line)
        assert text.startswith(f"{path}: "), (name, line)
        others = ("png, below the limit", "png text", "gif, its frame", "webp lossless")
        assert "pixels are refused" in text or name in others, (name, line)


def test_a_large_sixteen_bit_image_takes_no_wider_copies(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(np.tile(values, (16, 8))).save(tmp_path / "a.png")
    read_image(tmp_path / "a.png", 1)
    tracemalloc.start()
    try:
        found = np.asarray(read_image(tmp_path / "a.png", 1))
        assert tracemalloc.get_traced_memory()[1] < 9 * found.size  # numpy's; 64-bit numbers would take 24
    finally:
        tracemalloc.stop()
    assert np.array_equal(found[:256, :256], np.round(values / 257))


def test_a_file_that_would_start_a_program_is_not_opened(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not an image, or of an unknown format"):
        read_image(tmp_path / "a.jpg", 3)


SIXTEEN = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (12, 16), dtype=np.uint16))
SMALL = photograph((16, 12))
SEEDS = [
    encoded(SMALL),
    encoded(SMALL, progressive=True, exif=oriented(6)),
    encoded(SMALL.convert("CMYK")),
    *[encoded(SMALL.convert(mode), "PNG") for mode in ("RGB", "L", "LA", "RGBA", "1", "P")],
    *[encoded(SIXTEEN, name) for name in ("PNG", "TIFF")],
    encoded(SMALL.quantize(20), "GIF", save_all=True, append_images=[SMALL.quantize(5)]),
    *[encoded(SMALL, "WEBP", lossless=lossless) for lossless in (True, False)],
    *[encoded(SMALL, "TIFF", compression=name) for name in (None, "tiff_lzw", "tiff_adobe_deflate")],
    *[encoded(SMALL, name) for name in ("BMP", "TGA", "PPM")],
]
WORDS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\1\0\0", b"\xff\xd8"]


@st.composite
def damaged(draw):
    """A real file with bytes flipped, cut off, put in or overwritten; or bytes alone."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, 60)) if draw(st.booleans()) else draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove", "word"]))
        if what == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            data[at : at + 4] = draw(st.sampled_from(WORDS))
    return bytes(data)


CUT_IN_ADOBE = b"\xff\xd8\xff\xee\0\x0eAdobe"


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(*[damaged()] * 9, st.binary(max_size=80)), st.sampled_from([1, 3]), st.sampled_from(["pillow", "fast"])
)
@example(CUT_IN_ADOBE, 3, "fast")
def test_any_bytes_are_pixels_or_a_named_reason(tmp_path, monkeypatch, data, channels, decode):
    monkeypatch.setattr("boltlab.data.decode.MAX_PIXELS", 1_000_000)  # what is below it is slow, not wrong
    path = tmp_path / "a b.jpg"
    path.write_bytes(data)
    answer = pixels_or_reason(path, decode, channels)
    if isinstance(answer, str):
        assert answer.startswith(f"{path}: ") and "\n" not in answer
    else:
        assert answer.dtype == np.uint8 and answer.ndim == 3 and answer.shape[2] == channels and answer.size


def test_a_missing_library_is_named_with_the_cure(monkeypatch):
    monkeypatch.setattr("boltlab.data.decode.simplejpeg", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check_decode("auto") == "pillow" and check_decode("pillow") == "pillow"
    with pytest.raises(UserError, match=r"decode=fast needs simplejpeg: pip install 'boltlab\[photos\]'"):
        check_decode("fast")
    with pytest.raises(UserError, match=r"decode=fastest needs simplejpeg and OpenCV: pip install"):
        check_decode("fastest")
    monkeypatch.setattr("boltlab.data.decode.simplejpeg", object())
    assert check_decode("auto") == "fast"
