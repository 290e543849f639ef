"""The download path against a loopback mirror that serves tiny files in the true formats."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets

from boltlab.ground.errors import DataError
from project.data.torchvision_images import TorchvisionImages

pytestmark = pytest.mark.floats

CONFIGS = Path(__file__).parents[3] / "configs/data"
NAMES = [name for name, _ in datasets.MNIST.resources]
CLOSED = "http://127.0.0.1:9/"  # the discard port: nothing listens


def images_of(train):
    generator = np.random.default_rng(int(train))
    return generator.integers(0, 256, (60 if train else 20, 28, 28), dtype=np.uint8)


def labels_of(train):
    return np.arange(60 if train else 20, dtype=np.uint8) % 10


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """(folder that is served, its address, list of requested paths); torchvision's MNIST points there."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in NAMES:
        train = name.startswith("train")
        (folder / name).write_bytes(idx(images_of(train) if "images" in name else labels_of(train)))
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        md5 = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in NAMES]
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        monkeypatch.setattr(datasets.MNIST, "resources", md5)
        yield folder, address, requests
        server.shutdown()


def mnist(tmp_path, **options):
    return TorchvisionImages(name="MNIST", input_shape=(1, 28, 28), num_classes=10, data_dir=str(tmp_path / "data"),
                             **options)  # fmt: skip


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


UNPACKED = sorted(f"MNIST/raw/{name.removesuffix('.gz')}" for name in NAMES)


def test_download_split_and_no_second_download(tmp_path, mirror):
    data = mnist(tmp_path, val_fraction=10)
    data.prepare_data()
    assert files_below(tmp_path / "data") == UNPACKED
    assert torch.equal(data.dataset("test").x.squeeze(1), torch.from_numpy(images_of(False)))
    assert data.dataset("test").labels.tolist() == labels_of(False).tolist()
    assert data.class_counts("train").tolist() == [5] * 10
    assert data.class_counts("val").tolist() == [1] * 10
    together = torch.cat([data.dataset("train").x, data.dataset("val").x]).flatten(1).tolist()
    assert sorted(together) == sorted(torch.from_numpy(images_of(True)).flatten(1).tolist())
    requests = len(mirror[2])
    mnist(tmp_path).prepare_data()
    assert len(mirror[2]) == requests


def test_a_dead_mirror_is_passed_over(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [CLOSED, mirror[1]])
    mnist(tmp_path).prepare_data()
    assert files_below(tmp_path / "data") == UNPACKED


def test_a_wrong_checksum_is_refused_and_leaves_nothing_behind(tmp_path, mirror):
    right = (mirror[0] / NAMES[2]).read_bytes()
    (mirror[0] / NAMES[2]).write_bytes(right + b"more")
    with pytest.raises(DataError, match="the file is not the right one") as error:
        mnist(tmp_path).prepare_data()
    assert mirror[1] in str(error.value) and f"downloading {NAMES[2]}" in str(error.value)
    assert files_below(tmp_path / "data") == []
    with pytest.raises(DataError, match="missing or damaged"):
        mnist(tmp_path).dataset("train")
    (mirror[0] / NAMES[2]).write_bytes(right)
    mnist(tmp_path).prepare_data()
    assert files_below(tmp_path / "data") == UNPACKED


def test_an_answer_cut_short_is_tried_again(tmp_path, mirror, monkeypatch):
    broken = []

    def copyfile(self, source, outputfile):
        content = source.read()
        if NAMES[0] in self.path and len(broken) < 1:
            broken.append(self.path)
            content = content[: len(content) // 2]
        outputfile.write(content)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", copyfile)
    mnist(tmp_path).prepare_data()
    assert files_below(tmp_path / "data") == UNPACKED
    assert len(broken) == 1


def test_a_damaged_copy_is_replaced(tmp_path, mirror):
    mnist(tmp_path).prepare_data()
    damaged = tmp_path / "data" / UNPACKED[2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="missing or damaged"):
        mnist(tmp_path).dataset("train")
    mnist(tmp_path).prepare_data()
    assert damaged.read_bytes() == whole


def test_archives_put_there_by_hand_are_used(tmp_path, mirror, monkeypatch):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).write_bytes((mirror[0] / name).read_bytes())
    monkeypatch.setattr(datasets.MNIST, "mirrors", [CLOSED])
    mnist(tmp_path).prepare_data()
    assert len(mnist(tmp_path).dataset("test")) == 20


def test_two_processes_at_once(tmp_path, mirror):
    errors = []

    def prepare():
        try:
            mnist(tmp_path).prepare_data()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_below(tmp_path / "data") == UNPACKED


def test_no_network_and_no_data_is_one_short_error(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [CLOSED])
    with pytest.raises(DataError) as error:
        mnist(tmp_path).prepare_data()
    message = str(error.value)
    assert len(message.splitlines()) <= 7
    assert message.startswith("MNIST is missing or damaged, and could not be downloaded.")
    for part in (str(tmp_path / "data" / "MNIST" / "raw"), CLOSED, *NAMES, "data=digits"):
        assert part in message


def test_a_folder_that_cannot_be_written(tmp_path, mirror):
    (tmp_path / "data").write_text("a file stands where the folder should be")
    with pytest.raises(DataError, match="could not be downloaded"):
        mnist(tmp_path).prepare_data()


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")  # torchvision's tar
def test_cifar10_from_its_archive(tmp_path, mirror, monkeypatch):
    generator = np.random.default_rng(0)
    md5 = {}
    with tarfile.open(mirror[0] / "cifar-10-python.tar.gz", "w:gz") as archive:
        files = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]
        for name in files:
            pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)  # a row: red, green, blue planes
            content = {"data": pixels, "labels": [n % 10 for n in range(20)], "label_names": list("abcdefghij")}
            data = pickle.dumps(content)
            md5[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    packed = (mirror[0] / "cifar-10-python.tar.gz").read_bytes()
    cls = datasets.CIFAR10
    monkeypatch.setattr(cls, "url", mirror[1] + "cifar-10-python.tar.gz")
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(packed).hexdigest())
    monkeypatch.setattr(cls, "train_list", [[name, md5[name]] for name in files[:5]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5["batches.meta"]})

    data = TorchvisionImages(name="CIFAR10", input_shape=(3, 32, 32), num_classes=10, data_dir=str(tmp_path / "data"))
    data.prepare_data()
    assert data.dataset("test").x.shape == (20, 3, 32, 32)
    stored = pickle.loads((data.folder / "test_batch").read_bytes())["data"].reshape(20, 3, 32, 32)
    assert torch.equal(data.dataset("test").x, torch.from_numpy(stored))
    assert data.class_counts("train").tolist() == [9] * 10


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_the_config_agrees_with_torchvision(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    cls = getattr(datasets, config["name"])
    assert config["num_classes"] == len(config["class_names"]) == len(set(config["class_names"]))
    if name == "fashion_mnist":
        assert config["class_names"] == cls.classes
    assert len(config["mean"]) == len(config["std"]) == config["input_shape"][0]


def test_folds_and_a_fixed_part_of_the_official_training_set(tmp_path, mirror):
    data = [mnist(tmp_path, folds=3, fold=fold, max_samples=20) for fold in range(3)]
    data[0].prepare_data()
    vals = torch.cat([each.dataset("val").x for each in data]).flatten(1).tolist()
    assert sorted(vals) == sorted(torch.from_numpy(images_of(True)).flatten(1).tolist())
    for each in data:
        assert each.class_counts("val").tolist() == each.class_counts("train").tolist() == [2] * 10
        assert torch.equal(each.dataset("test").x.squeeze(1), torch.from_numpy(images_of(False)))
    with pytest.raises(DataError, match="data.folds=7: samples of class 0 beside the test set: 6"):
        mnist(tmp_path, folds=7, fold=0).prepare_data()
