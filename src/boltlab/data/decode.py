"""Reading one image file into the right pixels, or saying what is wrong with it.

Pillow is the reference. Plain JPEGs also go through simplejpeg, a binding of the same libjpeg-turbo: the same pixels to
the bit, in 0.8 of the time for a 500 x 375 photograph and in 0.25 for a 32 x 32 image, opening the file included.
torchvision's own decoder is deprecated since 0.29. No decoder here holds the interpreter lock while it works.
"""

import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from boltlab.ground.errors import DataError, UserError
from boltlab.ground.files import opened

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Decode = Literal["pillow", "fast", "fastest"]

MAX_PIXELS = 200_000_000  # of phones' largest photographs; Pillow by itself warns at 89 million and refuses twice that
MOST_BYTES = 1 << 30  # of a JPEG file that is read in one go
# What a file may hold, whatever its name says. Pillow knows forty formats more, of which one starts a program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_decode(decode: Literal["auto", "pillow", "fast", "fastest"]) -> Decode:
    """The decoder in use: "auto" is "fast" where its library is there. UserError if the one asked for lacks its own.

    "fastest" reads the same pixels as "fast"; it resizes them with OpenCV, without antialiasing.
    """
    if decode == "auto":
        return "pillow" if simplejpeg is None else "fast"
    lacks = [
        name
        for name, module, needed in (("simplejpeg", "simplejpeg", "fast"), ("OpenCV", "cv2", "fastest"))
        if decode in (needed, "fastest") and importlib.util.find_spec(module) is None
    ]
    if lacks:
        raise UserError(f"decode={decode} needs {' and '.join(lacks)}: pip install 'boltlab[photos]', or decode=pillow")
    return decode


def read_pixels(path: str | Path, channels: int, decode: Decode, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """What `read_image` reads, as uint8 [H,W,C], C-contiguous and writable; the same pixels with every `decode`.

    Any thread may call it. DataError names the path and the reason.
    """
    if decode != "pillow":
        pixels = plain_jpeg(jpeg_bytes(path), channels, max_pixels)
        if pixels is not None:
            return pixels
    image = read_image(path, channels, max_pixels)
    return np.array(image).reshape(image.height, image.width, channels)


def jpeg_bytes(path: str | Path) -> bytes:
    """The bytes of a JPEG file; none of any other, which Pillow meets again and says what it is."""
    try:
        with opened(path, buffering=0) as file:
            is_jpeg = file.read(2) == b"\xff\xd8" and file.seek(0, os.SEEK_END) <= MOST_BYTES
            return file.read() if is_jpeg and file.seek(0) == 0 else b""
    except OSError:
        return b""


def plain_jpeg(data: bytes | memoryview, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """The file whose bytes are `data` as uint8 [H,W,C]; None where it is up to Pillow to decode or to refuse."""
    if simplejpeg is None or not _is_plain_jpeg(memoryview(data), max_pixels):
        return None
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # broken or cut off; also what Pillow forgives
        return None
    if channels == 1:  # as Pillow weighs the colours: the Y of the file is rounded otherwise
        return np.array(Image.fromarray(pixels).convert("L"))[..., None]
    return pixels


_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_EXIF, _ADOBE, _PIXELS = 0xE1, 0xEE, 0xDA
_IGNORED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comment, applications


def _is_plain_jpeg(data: memoryview, max_pixels: int) -> bool:
    """Whether the headers promise a JPEG that every decoder reads alike: 8 bits, grey or YCbCr, upright, no bomb."""
    if bytes(data[:2]) != b"\xff\xd8":
        return False
    at, end = 2, len(data) - 4
    seen: set[int] = set()
    while at <= end and data[at] == 0xFF:
        marker, start, at = data[at + 1], at + 4, at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == _PIXELS:
            return not seen.isdisjoint(_FRAMES)
        if at > end or not _is_plain(marker, data[start:at], max_pixels):  # at > end: cut off in this segment
            return False
        if marker == _EXIF and marker in seen:
            return False
        seen.add(marker)
    return False


def _is_plain(marker: int, segment: memoryview, max_pixels: int) -> bool:
    if marker in _FRAMES:
        if len(segment) < 6:
            return False
        height, width = segment[1] << 8 | segment[2], segment[3] << 8 | segment[4]
        return segment[0] == 8 and 0 < height * width <= max_pixels and segment[5] in (1, 3)
    if marker == _EXIF:
        return _upright_exif(bytes(segment))
    if marker == _ADOBE:  # of its colour transforms only YCbCr is everyone's
        return len(segment) < 12 or bytes(segment[:5]) != b"Adobe" or segment[11] == 1
    return marker in _IGNORED


def _upright_exif(segment: bytes) -> bool:
    """Whether a segment APP1 surely rotates nothing (EXIF by number, XMP by name)."""
    if b"rientation" in segment:
        return False
    if b"\x01\x12" not in segment and b"\x12\x01" not in segment:  # the tag's number in either byte order
        return True
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow meets a broken block with almost any exception
        return False


def read_image(path: str | Path, channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The (first) picture of a file as 8-bit mode "L" (channels=1) or "RGB" (channels=3), upright.

    EXIF rotation is applied; 16-bit grey is scaled to 8 bits; what is transparent is laid over white; palettes and
    CMYK are converted. DataError names the path and the reason.

    max_pixels: a larger image is refused before its pixels are read. Pillow's own limit is raised to it.
    """
    if channels not in (1, 3):
        raise DataError(f"images are read with 1 or 3 channels, not {channels}")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS)
    try:
        with opened(path) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"{image.width} x {image.height} pixels are refused{_limit(max_pixels)}")
            image.load()
            return _flat(_upright(image), "L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders meet broken files with almost any exception
        raise DataError(f"{path}: {_reason(path, error, max_pixels)}") from error


def _limit(max_pixels: int) -> str:
    return f" (a decompression bomb?): data.max_pixels={max_pixels} is the limit"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block is no reason to refuse good pixels
        return image
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _flat(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # convert() would cut at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit pixels outside 0..65535 have no known range; save them with 8 or 16 bits")
        values = values.astype(np.uint32)  # round(values / 257), in place: of a large image each copy takes a GiB
        values *= 255
        values += 32895
        values >>= 16
        return Image.fromarray(values.astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise DataError("floating-point pixels have no known range; save them with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _reason(path: str | Path, error: Exception, max_pixels: int) -> str:
    try:
        with opened(path) as file:
            head = file.read(512)
    except OSError as cannot_open:
        return cannot_open.strerror or str(cannot_open)
    if not head:
        return "the file is empty"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page or XML, not an image"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {max_pixels} pixels are refused{_limit(max_pixels)}"
    return str(error) or type(error).__name__
