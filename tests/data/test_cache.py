import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from boltlab.data import cache as cache_module
from boltlab.data.cache import ImageCache
from boltlab.data.decode import read_pixels
from boltlab.data.memory import available_memory
from boltlab.data.resize import shrunk
from boltlab.ground.errors import DataError

SIZES = [(40, 60), (60, 40), (20, 90), (33, 33), (16, 16), (100, 50)]


@pytest.fixture
def files(tmp_path):
    """Photographs of several shapes as JPEG and PNG."""
    random, found = np.random.default_rng(0), []
    for i, (height, width) in enumerate(SIZES):
        folder = tmp_path / "images" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[0:height, 0:width]
        smooth = np.stack([np.sin(x / 9 + i), np.cos(y / 7), np.sin(x / 5 + y / 3)], -1) * 90 + 128
        pixels = (smooth + random.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
        found.append(str(folder / f"{i}.{'png' if i == 2 else 'jpg'}"))
        Image.fromarray(pixels).save(found[-1])
    return found


def expected(file, size, channels=3):
    pixels = read_pixels(file, channels, "pillow")
    return pixels if size is None else shrunk(pixels, size)


def whole_caches(folder):
    return sorted(path.parent for path in Path(folder).glob("*/cache.json"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("decode", ["pillow", "fast"])
def test_raw_holds_the_pixels(tmp_path, files, size, channels, decode):
    on_disk = ImageCache.open(files, channels, size, "raw", tmp_path / "cache", decode)
    in_memory = ImageCache.in_memory(files, channels, size, decode)
    assert len(on_disk) == len(in_memory) == len(files)
    for i, file in enumerate(files):
        assert np.array_equal(on_disk[i], expected(file, size, channels))
        assert np.array_equal(in_memory[i], on_disk[i])
    assert np.shares_memory(on_disk[3], on_disk.images)
    assert not on_disk[3].flags.writeable


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_near_and_smaller(tmp_path, files, channels):
    cache = ImageCache.open(files, channels, 24, "jpeg", tmp_path / "cache", "fast", quality=95)
    raw = ImageCache.open(files, channels, 24, "raw", tmp_path / "cache", "fast")
    assert len(cache.images) < 0.8 * len(raw.images)
    for i, file in enumerate(files):
        reference = expected(file, 24, channels)
        assert cache[i].shape == reference.shape
        assert np.abs(cache[i].astype(int) - reference).mean() < 12  # chroma at half the resolution
    worse = ImageCache.open(files, channels, 24, "jpeg", tmp_path / "cache", "fast", quality=20)
    assert len(worse.images) < len(cache.images)


def test_a_jpeg_that_need_not_be_scaled_is_kept_byte_for_byte(tmp_path, files, monkeypatch):
    pytest.importorskip("simplejpeg")
    jpegs = [file for file in files if file.endswith("jpg")]
    cache = ImageCache.open(jpegs, 3, None, "jpeg", tmp_path / "cache", "fast")
    assert cache.images.tobytes() == b"".join(Path(file).read_bytes() for file in jpegs)
    pixels = [cache[i] for i in range(len(jpegs))]
    monkeypatch.setattr("boltlab.data.decode.simplejpeg", None)  # a machine without it reads the same
    for i, file in enumerate(jpegs):
        assert np.array_equal(cache[i], pixels[i]) and np.array_equal(cache[i], expected(file, None))


def test_it_is_built_once_and_shared(tmp_path, files, monkeypatch):
    first = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    monkeypatch.setattr(cache_module, "_entry", None)
    again = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    fastest = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fastest")  # the same pixels
    assert first.folder == again.folder == fastest.folder
    other = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 500 and np.array_equal(other[2], first[2])


def test_any_change_of_files_or_parameters_is_another_cache(tmp_path, files):
    def folder(names=files, channels=3, size=24, image_format="raw", decode="fast", **options):
        return ImageCache.open(names, channels, size, image_format, tmp_path / "cache", decode, **options).folder

    folders = {folder(), folder(channels=1), folder(size=25), folder(size=None), folder(decode="pillow")}
    folders |= {folder(image_format="jpeg"), folder(image_format="jpeg", quality=50)}
    folders |= {folder(files[:-1]), folder(files[::-1])}
    assert len(folders) == 9
    os.utime(files[0], ns=(0, 1))
    assert folder() not in folders
    Image.new("RGB", (7, 7)).save(files[0])
    os.utime(files[0], ns=(0, 1))
    renewed = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    assert renewed[0].shape == (7, 7, 3) and renewed.folder not in folders
    Path(files[0]).rename(files[0] + ".jpeg")
    assert folder([files[0] + ".jpeg", *files[1:]]) != renewed.folder


@pytest.fixture
def alike(tmp_path):
    """Two pictures of one size in bytes and one time, a black and a white one, in a folder each."""
    paths = [tmp_path / "images" / name / "0.bmp" for name in ("black", "white")]
    for path in paths:
        path.parent.mkdir(parents=True)
        Image.new("RGB", (6, 4), path.parent.name).save(path)
        os.utime(path, ns=(0, 10**18))
    return paths


def brightness(paths, folder):
    cache = ImageCache.open(list(map(str, paths)), 3, None, "raw", folder, "pillow")
    return [int(cache[i].mean()) for i in range(len(paths))]


@pytest.mark.parametrize("way", ["rsync", "rename", "hard link"])
def test_pictures_exchanged_with_their_times_kept_are_another_cache(tmp_path, alike, way):
    assert brightness(alike, tmp_path / "cache") == [0, 255]
    contents = [path.read_bytes() for path in alike]
    if way == "rsync":
        for path, content in zip(alike, reversed(contents), strict=True):
            path.write_bytes(content)
            os.utime(path, ns=(0, 10**18))
    else:
        for number, path in enumerate(alike):
            path.rename(tmp_path / f"{number}.bmp")
        for number, path in enumerate(reversed(alike)):
            move = os.link if way == "hard link" else os.rename
            move(tmp_path / f"{number}.bmp", path)
    assert [path.stat().st_mtime_ns for path in alike] == [10**18] * 2
    assert brightness(alike, tmp_path / "cache") == [255, 0]


@pytest.mark.parametrize("of", ["files", "folders"])
def test_links_exchanged_are_another_cache(tmp_path, alike, of, monkeypatch):
    """Also where no time tells what they lead to apart."""
    links = [tmp_path / name / "0.bmp" for name in ("a", "b")]

    def key(first, second):
        for link, target in zip(links, (first, second), strict=True):
            if of == "folders":
                link.parent.unlink(missing_ok=True)
                link.parent.symlink_to(target.parent)
            else:
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(target)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda path: SimpleNamespace(st_size=1, st_mtime_ns=1, st_ctime_ns=1, st_mode=1))
            return cache_module._key(list(map(str, links)), {})

    assert key(*alike) == key(*alike) != key(*reversed(alike))


@pytest.mark.parametrize("image_format", ["raw", "jpeg", "memory"])
def test_an_unreadable_image_is_an_error_only_where_it_is_read(tmp_path, files, image_format):
    Path(files[1]).write_bytes(b"")
    Path(files[4]).write_bytes(Path(files[4]).read_bytes()[:200])

    def cache():
        if image_format == "memory":
            return ImageCache.in_memory(files, 3, 24, "fast")
        return ImageCache.open(files, 3, 24, image_format, tmp_path / "cache", "fast")

    for images in (cache(), cache(), pickle.loads(pickle.dumps(cache()))):
        assert (images.index[:, 2] < 0).nonzero()[0].tolist() == [1, 4]
        for i in (1, 4):
            with pytest.raises(DataError) as reference:
                read_pixels(files[i], 3, "pillow")
            with pytest.raises(DataError) as error:
                images[i]
            assert str(error.value) == str(reference.value) and files[i] in str(error.value)
        assert images[2].shape == expected(files[2], 24).shape
        assert images.stacked() is None


def test_images_of_one_shape_are_one_array(tmp_path, files):
    same = [files[0]] * 3
    for images in (ImageCache.open(same, 3, 24, "raw", tmp_path, "fast"), ImageCache.in_memory(same, 3, 24, "fast")):
        stacked = images.stacked()
        assert stacked.shape == (3, 24, 36, 3) and np.shares_memory(stacked, images.images)
        assert np.array_equal(stacked[2], expected(files[0], 24))
    assert ImageCache.in_memory(files, 3, 24, "fast").stacked() is None
    assert ImageCache.open(same, 3, 24, "jpeg", tmp_path, "fast").stacked() is None


BUILD = """
import sys, time
from boltlab.data import cache
make, files = cache._entry, sys.argv[3:]
def slowly(file, *arguments):
    time.sleep(float(sys.argv[2]))
    return make(file, *arguments)
cache._entry, cache.SYNC_IMAGES, cache._estimate = slowly, 3, lambda files, make: 0
built = cache.ImageCache.open(files, 3, 24, "raw", sys.argv[1], "pillow")
print(built.images.sum(), flush=True)
"""


def build(folder, seconds_per_image, files, **options):
    command = [sys.executable, "-c", BUILD, str(folder), str(seconds_per_image), *files]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_killed_build_goes_on_and_others_wait(tmp_path, files):
    many = files * 10
    process = build(tmp_path / "cache", 0.05, many)
    while not any(path.stat().st_size >= 32 * 9 for path in tmp_path.glob("cache/*/index.bin")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert whole_caches(tmp_path / "cache") == []
    done = min(path.stat().st_size for path in tmp_path.glob("cache/*/index.bin")) // 32

    together = [build(tmp_path / "cache", 0.0, many) for _ in range(2)]
    printed = [process.communicate()[0].split()[-1] for process in together]
    reference = sum(int(expected(file, 24).sum()) for file in many)
    assert printed == [str(reference)] * 2 and 9 <= done < len(many)
    cache = ImageCache.open(many, 3, 24, "raw", tmp_path / "cache", "pillow")
    assert all(np.array_equal(cache[i], expected(file, 24)) for i, file in enumerate(many))


@pytest.mark.parametrize("lost", ["index", "images", "both", "zeros", "all zeros"])
def test_whatever_an_interruption_left_is_used_rightly(tmp_path, files, monkeypatch, lost):
    Path(files[1]).write_bytes(b"")
    finished = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    reference, entry = finished.images.copy(), finished.folder
    (entry / "cache.json").unlink()
    if lost in ("index", "both"):
        os.truncate(entry / "index.bin", 32 * 4 + 5)
    if lost in ("images", "both"):
        os.truncate(entry / "images.bin", finished.index[3, 0] + 7)
    if lost == "zeros":  # as after a power cut
        (entry / "index.bin").write_bytes((entry / "index.bin").read_bytes()[: 32 * 2] + bytes(32 * 4))
    if lost == "all zeros":
        (entry / "index.bin").write_bytes(bytes(32 * 6))
    made = []
    make = cache_module._entry
    monkeypatch.setattr(cache_module, "_estimate", lambda files, make: 0)
    monkeypatch.setattr(cache_module, "_entry", lambda file, *rest: made.append(file) or make(file, *rest))
    again = ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    assert np.array_equal(again.images, reference) and np.array_equal(again.index, finished.index)
    kept = {"index": 4, "images": 3, "both": 3, "zeros": 2, "all zeros": 0}[lost]
    assert sorted(made) == sorted(files[kept:])


@pytest.mark.parametrize("name", ["images.bin", "index.bin", "cache.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_cache_is_noticed(tmp_path, files, name, harm):
    entry = ImageCache.open(files, 3, 24, "raw", tmp_path, "fast").folder
    if harm == "cut":
        os.truncate(entry / name, (entry / name).stat().st_size - 1)
    else:
        (entry / name).unlink()
    with pytest.raises(DataError, match="is damaged: delete that folder"):
        ImageCache.load(entry)


def test_a_full_disk_is_one_clear_error(tmp_path, files, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"needs about .* GB in .* and 1e-06 GB are free: take another folder"):
        ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    monkeypatch.undo()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="cannot write the image cache .*: No space left on device"):
        ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")
    monkeypatch.undo()
    assert whole_caches(tmp_path / "cache") == []
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/*/*.bin")) == 0
    assert np.array_equal(ImageCache.open(files, 3, 24, "raw", tmp_path / "cache", "fast")[5], expected(files[5], 24))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, files):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the image cache .*file"):
        ImageCache.open(files, 3, 24, "raw", tmp_path / "file", "fast")


def test_images_that_do_not_fit_in_memory_are_refused_before_they_are_read(files, monkeypatch):
    assert available_memory() is None or available_memory() > 10**6
    monkeypatch.setattr("boltlab.data.memory.available_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"6 images in .* need 3\.8.*e-05 GB of memory, 1e-05 GB are free"):
        ImageCache.in_memory(files, 3, None, "fast")
    monkeypatch.setattr("boltlab.data.memory.available_memory", lambda: None)
    monkeypatch.setattr(cache_module, "_estimate", lambda files, make: 100)  # too few
    images = ImageCache.in_memory(files, 3, None, "fast")
    assert all(np.array_equal(images[i], expected(file, None)) for i, file in enumerate(files))


def test_the_files_of_a_cache_are_plain(tmp_path, files):
    entry = ImageCache.open(files, 3, 24, "raw", tmp_path, "fast").folder
    about = json.loads((entry / "cache.json").read_text())
    assert about["parameters"] == {"channels": 3, "size": 24, "format": "raw", "decode": "fast"}
    index = np.fromfile(entry / "index.bin", "<i8").reshape(-1, 4)
    offset, length, height, width = index[2]
    data = (entry / "images.bin").read_bytes()[offset : offset + length]
    assert np.array_equal(np.frombuffer(data, np.uint8).reshape(height, width, 3), expected(files[2], 24))
