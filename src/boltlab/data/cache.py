"""Decoded images kept for later epochs and runs: on disk, shared by all processes of a machine, or in memory.

A cache on disk is one folder, named by a hash of all that decides its content (the files' names, sizes and times, the
size and format wanted, the decoder); an old one is never used again and may be deleted. The times are those of the last
write, which rsync and tar set back, and of the last change of any kind (ctime), which only the file system sets. Where
it keeps none (sshfs, object stores), pictures exchanged in size and time alike are not noticed.

    images.bin   the images one after another: uint8 [H,W,C] (raw) or JPEG files (jpeg); why one is unreadable, UTF-8
    index.bin    int64 little-endian [N,4]: offset and bytes in images.bin, height, width; height -1: unreadable
    cache.json   format version, parameters and lengths; written last: without it the cache is not whole
    lock         held (flock) by the process that builds

Images come in the order of their index, each stretch synced to disk before its lines of the index. So whatever kills
the process leaves a beginning that is right, and the next one resumes from there.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from boltlab.data.decode import MAX_PIXELS, Decode, jpeg_bytes, plain_jpeg, read_pixels
from boltlab.data.loader import available_cores
from boltlab.data.many_files import in_order, of_each, progress_bar
from boltlab.data.memory import refuse_without_room
from boltlab.data.resize import fit, shrunk
from boltlab.ground.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Format = Literal["raw", "jpeg"]
Entry = tuple[Any, int, int]  # what one image becomes: its bytes, height, width; or why it is unreadable, -1, 0

VERSION = 3
SYNC_IMAGES = 256  # a killed build repeats so many at most
SAMPLE = 32  # images read to estimate the size of all
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN}


@dataclass(frozen=True)
class Fitted:
    """The arguments of `resize.fit`."""

    size: tuple[int, int]
    resize: int | None
    fastest: bool


@dataclass(eq=False, repr=False)
class ImageCache:
    """`cache[i]` is image i, uint8 [H,W,C] and read-only on disk; DataError if it was unreadable. Any thread may ask.

    images: uint8 [bytes]; index: int64 [N,4]; both as the file's head says.
    """

    images: np.ndarray
    index: np.ndarray
    channels: int
    format: Format = "raw"
    folder: Path | None = None

    @classmethod
    def open(
        cls,
        files: list[str],
        channels: int,
        size: int | None,
        format: Format,
        folder: str | Path,
        decode: Decode,
        quality: int = 90,
        progress: bool = True,
        fitted: Fitted | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> "ImageCache":
        """The cache of `files` below `folder`; built first, by all cores, unless it is there.

        size: images whose shorter side is longer are scaled down to it, antialiased; None keeps all as they are.
        fitted: instead, every image is kept as `resize.fit` makes it.
        format: "jpeg" is a tenth of "raw"'s bytes and several times as slow to read; `quality` is JPEG's. A plain JPEG
            that need not be scaled is kept byte for byte, where simplejpeg is there.

        Of several processes one builds and the others wait. DataError if it does not fit on the disk, if the folder
        cannot be written, or if a finished cache was damaged.
        """
        parameters = {"channels": channels, "size": size, "format": format, "decode": decode.replace("fastest", "fast")}
        if format == "jpeg":
            parameters["quality"] = quality
        if fitted is not None:
            parameters |= asdict(fitted)
        if max_pixels != MAX_PIXELS:
            parameters["max_pixels"] = max_pixels
        entry = Path(folder) / _key(files, parameters)

        def make(file: str) -> Entry:
            return _entry(file, channels, size, decode, quality if format == "jpeg" else None, fitted, max_pixels)

        try:
            if not (entry / "cache.json").exists():
                entry.mkdir(parents=True, exist_ok=True)
                with _only_one(entry / "lock"):
                    if not (entry / "cache.json").exists():
                        _build(files, make, entry, parameters, progress)
        except OSError as error:
            raise DataError(f"cannot write the image cache {entry}: {error.strerror or error}") from error
        return cls.load(entry)

    @classmethod
    def load(cls, entry: Path) -> "ImageCache":
        """A finished cache. DataError if a file of it is not what was written."""
        try:
            about = json.loads((entry / "cache.json").read_text())
            index = np.fromfile(entry / "index.bin", "<i8")
            written = (entry / "images.bin").stat().st_size
            whole = zlib.crc32(index.tobytes()) == about["index_crc32"] and written == about["bytes"]
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise DataError(f"the image cache {entry} is damaged: delete that folder, and it is built anew")
        images = np.asarray(np.memmap(entry / "images.bin", np.uint8, "r")) if written else np.empty(0, np.uint8)
        parameters = about["parameters"]
        return cls(images, index.reshape(-1, 4), parameters["channels"], parameters["format"], entry)

    @classmethod
    def in_memory(
        cls,
        files: list[str],
        channels: int,
        size: int | None,
        decode: Decode,
        progress: bool = True,
        processes: int = 1,
        max_pixels: int = MAX_PIXELS,
    ) -> "ImageCache":
        """The same in this process's memory, raw. DataError, at once, if all `processes` of the machine that do so
        will not find room."""

        def make(file: str) -> Entry:
            return _entry(file, channels, size, decode, None, max_pixels=max_pixels)

        refuse_without_room(len(files), _estimate(files, make), processes)
        images, lines = io.BytesIO(), []
        for data, height, width in _made(files, make, 0, "decoding images", progress):
            lines.append((images.tell(), len(data), height, width))
            images.write(data)
        return cls(np.frombuffer(images.getbuffer(), np.uint8), np.array(lines, np.int64).reshape(-1, 4), channels)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> np.ndarray:
        offset, length, height, width = self.index[i].tolist()
        data = self.images[offset : offset + length]
        if height < 0:
            raise DataError(data.tobytes().decode(errors="surrogateescape"))
        if self.format == "raw":
            return data.reshape(height, width, self.channels)
        pixels = plain_jpeg(data.data, self.channels)
        if pixels is None:  # no simplejpeg here
            with Image.open(io.BytesIO(data.tobytes())) as image:
                pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        return pixels.reshape(height, width, self.channels)

    def stacked(self) -> np.ndarray | None:
        """All images as one view, uint8 [N,H,W,C]; None if they differ in shape, are JPEGs, or one is unreadable."""
        shapes = self.index[:, 2:]
        if self.format != "raw" or len(self) == 0 or shapes[0, 0] < 0 or (shapes != shapes[0]).any():
            return None
        return self.images.reshape(len(self), *shapes[0].tolist(), self.channels)

    def __reduce__(self) -> Any:
        if self.folder is not None:  # a worker process maps the file, and copies nothing
            return ImageCache.load, (self.folder,)
        return ImageCache, (self.images, self.index, self.channels, self.format)


def _entry(
    file: str,
    channels: int,
    size: int | None,
    decode: Decode,
    quality: int | None,
    fitted: Fitted | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Entry:
    """The image as it is stored: raw where `quality` is None, else as JPEG."""
    data, pixels = b"", None
    try:
        if quality is not None and fitted is None:
            data = jpeg_bytes(file)
            pixels = plain_jpeg(data, channels, max_pixels)
        is_plain = pixels is not None
        if pixels is None:
            pixels = read_pixels(file, channels, decode, max_pixels)
    except (DataError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in PASSING):
            raise DataError(f"{error}: no fault of the file, so the image cache does not keep it; run again") from error
        return str(error).encode(errors="surrogateescape"), -1, 0
    small = pixels if size is None else shrunk(pixels, size)
    if fitted is not None:
        small = fit(pixels, fitted.size, fitted.resize, fitted.fastest)
        is_plain = False
    height, width = small.shape[:2]
    if quality is None:
        return small.reshape(-1), height, width
    if small is not pixels or not is_plain:
        buffer = io.BytesIO()
        Image.fromarray(small.squeeze(-1) if channels == 1 else small).save(buffer, "JPEG", quality=quality)
        data = buffer.getvalue()
    return data, height, width


def _key(files: list[str], parameters: dict[str, Any]) -> str:
    def look(file: str) -> str:
        try:
            found = os.stat(file)
            link = os.path.realpath(file) if os.path.islink(file) else ""
            return f"\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0{found.st_mode}\0{link}"
        except OSError as error:
            return f"\0{error.errno}"

    root = os.path.commonpath(files) if len(files) > 1 else os.path.dirname(files[0])
    lines = [file.removeprefix(root) + seen for file, seen in zip(files, of_each(files, look), strict=True)]
    folders = [os.path.realpath(folder) for folder in sorted({os.path.dirname(file) for file in files})]  # links change
    head = json.dumps([VERSION, os.path.realpath(root), folders, parameters], sort_keys=True)
    return hashlib.sha256("\n".join([head, *lines]).encode(errors="surrogateescape")).hexdigest()[:20]


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock. The system takes it from a process that ends, however it ends."""
    if fcntl is None:
        raise DataError("an image cache on disk needs file locks (fcntl), which this system lacks: keep it in memory")
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"waiting for the process that builds the image cache {path.parent}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    files: list[str], make: Callable[[str], Entry], entry: Path, parameters: dict[str, Any], progress: bool
) -> None:
    with (entry / "images.bin").open("ab") as images, (entry / "index.bin").open("ab") as index:
        done, end = _cut_to_what_is_whole(images, index)
        needed, free = _estimate(files[done:], make), shutil.disk_usage(entry).free
        if needed > free:
            raise DataError(
                f"the image cache needs about {_gigabytes(needed)} in {entry.parent} and {_gigabytes(free)} are free: "
                f"take another folder, a smaller size or the format jpeg"
            )
        lines: list[tuple[int, int, int, int]] = []

        def sync() -> None:
            _sync(images)
            index.write(np.array(lines, "<i8").tobytes())
            index.flush()
            lines.clear()

        try:
            for data, height, width in _made(files, make, done, "building the image cache", progress):
                images.write(data)
                lines.append((end, len(data), height, width))
                end += len(data)
                if len(lines) == SYNC_IMAGES:
                    sync()
            sync()
            _sync(index)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk is full for everyone: give it back
                for file in (index, images):
                    os.truncate(file.name, 0)
            raise
    crc32 = zlib.crc32((entry / "index.bin").read_bytes())
    about = {"version": VERSION, "parameters": parameters, "bytes": end, "index_crc32": crc32}
    with (entry / "cache.json.part").open("wb") as text:
        text.write(json.dumps(about, indent=1).encode())
        _sync(text)
    (entry / "cache.json.part").replace(entry / "cache.json")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _cut_to_what_is_whole(images: BinaryIO, index: BinaryIO) -> tuple[int, int]:
    """(number of images that an interrupted build left whole, their bytes); the two files end there afterwards."""
    lines = np.fromfile(index.name, "<i8", count=os.fstat(index.fileno()).st_size // 32 * 4).reshape(-1, 4)
    ends = lines[:, 0] + lines[:, 1]
    whole = (lines[:, 0] == np.r_[0, ends[:-1]]) & (ends <= os.fstat(images.fileno()).st_size) & (lines[:, 1] > 0)
    done = len(whole) if whole.all() else int(whole.argmin())
    end = int(ends[done - 1]) if done else 0
    index.truncate(32 * done)
    images.truncate(end)
    return done, end


def _made(files: list[str], make: Callable[[str], Entry], done: int, what: str, progress: bool) -> Iterator[Entry]:
    """What becomes of the files behind the first `done`, by all cores."""
    with progress_bar(len(files), done, what, progress) as advance:
        for made in in_order(make, files[done:], available_cores()):
            yield made
            advance(1)


def _estimate(files: list[str], make: Callable[[str], Entry]) -> int:
    """Bytes of all, by a sample evenly spaced."""
    some = files[:: max(1, len(files) // SAMPLE)][: SAMPLE + 1]
    sizes = [len(data) for data, height, _ in in_order(make, some, available_cores()) if height >= 0]
    return round(sum(sizes) / max(1, len(sizes)) * len(files))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
