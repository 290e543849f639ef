"""Decoded images kept for later epochs and runs: on disk, shared by all processes of a machine, or in memory.

A cache on disk is one folder, named by a hash of all that decides its content (the files' names, sizes and times, the
size and format wanted, the decoder), so it never goes stale; an old one is never used again and may be deleted.

    images.bin   the images one after another: uint8 [H,W,C] (raw) or JPEG files (jpeg)
    index.bin    int64 little-endian [N,4]: offset and bytes in images.bin, height, width; height -1: unreadable
    problems     a line of JSON, [index, message], for each unreadable image
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
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from boltlab.data.decode import Decode, plain_jpeg, read_pixels
from boltlab.data.progress import progress_bar
from boltlab.data.resize import fit, shrunk
from boltlab.ground.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Format = Literal["raw", "jpeg"]
# What one image becomes: its bytes, height, width; or why it cannot be read.
Entry = tuple[Any, int, int] | str
NOTHING: tuple[Any, int, int] = (np.empty(0, np.uint8), -1, 0)

VERSION = 1
SYNC_IMAGES = 256  # a killed build repeats so many at most
SAMPLE = 32  # images read to estimate the size of all
MEMORY_SHARE = 0.8  # of the memory that is free
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN}
GROW_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Fitted:
    """The arguments of `resize.fit`."""

    size: tuple[int, int]
    resize: int | None
    fastest: bool


class ImageCache:
    """`cache[i]` is image i, uint8 [H,W,C] and read-only if raw; DataError if it was unreadable. Any thread may ask."""

    def __init__(
        self,
        images: np.ndarray,  # uint8 [bytes]
        index: np.ndarray,  # int64 [N,4], as the file's head says
        problems: dict[int, str],
        channels: int,
        image_format: Format = "raw",
        folder: Path | None = None,
    ) -> None:
        self.images, self.index, self.problems = images, index, problems
        self.channels, self.format, self.folder = channels, image_format, folder

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
        entry = Path(folder) / _key(files, parameters)

        def make(file: str) -> Entry:
            return _entry(file, channels, size, decode, quality if format == "jpeg" else None, fitted)

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
        problems = {int(i): message for i, message in about["problems"].items()}
        parameters = about["parameters"]
        return cls(images, index.reshape(-1, 4), problems, parameters["channels"], parameters["format"], entry)

    @classmethod
    def in_memory(
        cls,
        files: list[str],
        channels: int,
        size: int | None,
        decode: Decode,
        progress: bool = True,
        processes: int = 1,
    ) -> "ImageCache":
        """The same in this process's memory, raw. DataError, at once, if all `processes` of the machine that do so
        will not find room."""
        needed, free = _estimate(files, lambda file: _entry(file, channels, size, decode, None)), available_memory()
        if free is not None and processes * needed > MEMORY_SHARE * free:
            raise DataError(
                f"{len(files)} images need about {_gigabytes(needed)} of memory and {_gigabytes(free)} are free: "
                f"keep them on disk or make them smaller"
            )
        images, used = np.empty(int(needed * 1.02), np.uint8), 0  # what is not written to takes no memory
        records, problems = [], {}
        with progress_bar(len(files), 0, "decoding images", progress) as advance, _pool() as pool:
            for i, made in enumerate(_in_order(pool, lambda f: _entry(f, channels, size, decode, None), files)):
                data, height, width = NOTHING if isinstance(made, str) else made
                if isinstance(made, str):
                    problems[i] = made
                records.append((used, len(data), height, width))
                if used + len(data) > len(images):
                    images.resize(used + len(data) + GROW_BYTES, refcheck=False)
                images[used : used + len(data)] = data
                used += len(data)
                advance(1)
        images.resize(used, refcheck=False)
        return cls(images, np.array(records, np.int64).reshape(-1, 4), problems, channels)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> np.ndarray:
        offset, length, height, width = self.index[i].tolist()
        if height < 0:
            raise DataError(self.problems[i])
        data = self.images[offset : offset + length]
        if self.format == "raw":
            return data.reshape(height, width, self.channels)
        pixels = plain_jpeg(data.data, self.channels)
        if pixels is None:  # no simplejpeg here
            with Image.open(io.BytesIO(data.tobytes())) as image:
                pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        return pixels.reshape(height, width, self.channels)

    def stacked(self) -> np.ndarray | None:
        """All images as one view, uint8 [N,H,W,C]; None if they differ in shape, are JPEGs, or one is unreadable."""
        if self.format != "raw" or self.problems or len(self) == 0 or (self.index[:, 2:] != self.index[0, 2:]).any():
            return None
        return self.images.reshape(len(self), *self.index[0, 2:].tolist(), self.channels)

    def __reduce__(self) -> Any:
        if self.folder is not None:  # a worker process maps the file, and copies nothing
            return ImageCache.load, (self.folder,)
        return ImageCache, (self.images, self.index, self.problems, self.channels, self.format)


def available_memory() -> int | None:
    """Bytes that this process can still take, by the system and by its control groups; None where nobody tells."""
    found = []
    with suppress(OSError):
        sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(sizes["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        for folder in (group, *group.parents[:-3]):  # up to /sys/fs/cgroup; the limit of a Slurm job is a parent's
            if (folder / "memory.max").exists() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(cached["inactive_file"])
                found.append(int(limit) - used)
    return min(found, default=None)


def _entry(
    file: str, channels: int, size: int | None, decode: Decode, quality: int | None, fitted: Fitted | None = None
) -> Entry:
    """The image as it is stored: raw where `quality` is None, else as JPEG."""
    data, pixels = b"", None
    try:
        if quality is not None and fitted is None:
            data = Path(file).read_bytes()
            pixels = plain_jpeg(data, channels)
        is_plain = pixels is not None
        if pixels is None:
            pixels = read_pixels(file, channels, decode)
    except (DataError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in PASSING):
            raise DataError(f"{error}: no fault of the file, so the image cache does not keep it; run again") from error
        return str(error)
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
    root = os.path.commonpath(files) if len(files) > 1 else os.path.dirname(files[0])
    lines = [file.removeprefix(root) for file in files]

    def look(start: int) -> None:
        for i in range(start, len(files), 16):
            try:
                found = os.stat(files[i])
                lines[i] += f"\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_mode}"
            except OSError as error:
                lines[i] += f"\0{error.errno}"

    with ThreadPoolExecutor(16) as pool:  # on a network's file system each look waits
        list(pool.map(look, range(16)))
    head = json.dumps([VERSION, os.path.realpath(root), parameters], sort_keys=True)
    return hashlib.sha256("\n".join([head, *lines]).encode(errors="surrogateescape")).hexdigest()[:20]


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock. The system takes it from a process that ends, however it ends."""
    if fcntl is None:
        raise DataError("an image cache on disk needs file locks (fcntl), which this system lacks: keep it in memory")
    with path.open("ab") as file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if not said:
                print(f"waiting for the process that builds the image cache {path.parent}", flush=True)
                said = True
            time.sleep(0.2)
        yield


def _build(
    files: list[str], make: Callable[[str], Entry], entry: Path, parameters: dict[str, Any], progress: bool
) -> None:
    with (
        (entry / "images.bin").open("ab") as images,
        (entry / "index.bin").open("ab") as index,
        (entry / "problems").open("a") as problems,
    ):
        done, end = _cut_to_what_is_whole(images, index)
        problems.write("\n")  # a line of the build before may have been cut off
        remaining = files[done:]
        needed, free = _estimate(remaining, make), shutil.disk_usage(entry).free
        if needed > free:
            raise DataError(
                f"the image cache needs about {_gigabytes(needed)} in {entry.parent} and {_gigabytes(free)} are free: "
                f"take another folder, a smaller size or the format jpeg"
            )
        lines: list[tuple[int, int, int, int]] = []

        def sync() -> None:
            for file in (images, problems):
                file.flush()
                os.fsync(file.fileno())
            index.write(np.array(lines, "<i8").tobytes())
            index.flush()
            lines.clear()

        try:
            with progress_bar(len(files), done, "building the image cache", progress) as advance, _pool() as pool:
                for i, made in enumerate(_in_order(pool, make, remaining), done):
                    data, height, width = NOTHING if isinstance(made, str) else made
                    if isinstance(made, str):
                        problems.write(json.dumps([i, made]) + "\n")
                    images.write(data)
                    lines.append((end, len(data), height, width))
                    end += len(data)
                    if len(lines) == SYNC_IMAGES:
                        sync()
                    advance(1)
            sync()
            os.fsync(index.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk is full for everyone: give it back
                for file in (index, images):
                    os.truncate(file.name, 0)
            raise
    about = {
        "version": VERSION,
        "parameters": parameters,
        "bytes": end,
        "index_crc32": zlib.crc32((entry / "index.bin").read_bytes()),
        "problems": _problems(entry),
    }
    with (entry / "cache.json.part").open("w") as text:
        json.dump(about, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    (entry / "cache.json.part").replace(entry / "cache.json")


def _cut_to_what_is_whole(images: BinaryIO, index: BinaryIO) -> tuple[int, int]:
    """(number of images that an interrupted build left whole, their bytes); the two files end there afterwards."""
    lines = np.fromfile(index.name, "<i8", count=os.fstat(index.fileno()).st_size // 32 * 4).reshape(-1, 4)
    ends = lines[:, 0] + lines[:, 1]
    whole = (lines[:, 0] == np.r_[0, ends[:-1]]) & (ends <= os.fstat(images.fileno()).st_size)
    whole &= (lines[:, 1] > 0) | (lines[:, 2] == -1)
    done = len(whole) if whole.all() else int(whole.argmin())
    end = int(ends[done - 1]) if done else 0
    index.truncate(32 * done)
    images.truncate(end)
    return done, end


def _problems(entry: Path) -> dict[int, str]:
    """Index: message of what is unreadable. A build that was interrupted may have left other lines."""
    unreadable = np.fromfile(entry / "index.bin", "<i8").reshape(-1, 4)[:, 2] < 0
    found = {}
    for line in (entry / "problems").read_text().splitlines():
        try:
            i, message = json.loads(line)
        except ValueError:
            continue
        if unreadable[i]:
            found[i] = message
    return found


def _estimate(files: list[str], make: Callable[[str], Entry]) -> int:
    """Bytes of all, by a sample evenly spaced."""
    some = files[:: max(1, len(files) // SAMPLE)][: SAMPLE + 1]
    with _pool() as pool:
        sizes = [len(made[0]) for made in pool.map(make, some) if isinstance(made, tuple)]
    return round(sum(sizes) / max(1, len(sizes)) * len(files))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def _in_order(pool: ThreadPoolExecutor, make: Callable[[str], Entry], files: list[str]) -> Iterator[Entry]:
    """pool.map that runs only a little ahead of whoever takes the results."""
    waiting: deque[Future[Entry]] = deque()
    for file in files:
        waiting.append(pool.submit(make, file))
        if len(waiting) > 4 * (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
