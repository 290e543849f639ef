"""Reading one image file into the right pixels, or saying what is wrong with it."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from boltlab.errors import DataError

MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB as RGB
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path, channels: int) -> Image.Image:
    """The (first) picture of a file as 8-bit mode "L" (channels=1) or "RGB" (channels=3), upright.

    EXIF rotation is applied; 16-bit grey is scaled to 8 bits; what is transparent is laid over white; palettes and
    CMYK are converted. DataError names the path and the reason.
    """
    if channels not in (1, 3):
        raise DataError(f"images are read with 1 or 3 channels, not {channels}")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels are refused (a decompression bomb?)")
            image.load()
            return _flat(_upright(image), "L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders meet broken files with almost any exception
        raise DataError(f"{path}: {_reason(path, error)}") from error


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
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit pixels outside 0..65535 have no known range; save them with 8 or 16 bits")
        return Image.fromarray(((values * 2 + 257) // 514).astype(np.uint8)).convert(mode)  # round(values / 257)
    if image.mode == "F":
        raise DataError("floating-point pixels have no known range; save them with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _reason(path: str | Path, error: Exception) -> str:
    try:
        with Path(path).open("rb") as file:
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
        return f"more than {MAX_PIXELS} pixels are refused (a decompression bomb?)"
    return str(error) or type(error).__name__
