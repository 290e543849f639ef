import enum
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from boltlab import checkpoint
from boltlab.checkpoint import CheckpointError


def content(**more):
    return {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3, **more}


def test_reads_back_what_was_written_and_loads_with_plain_torch(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    checkpoint.write(content(config={"a": [1, None, "x"]}), path)
    for loaded in (checkpoint.read(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["weight"], torch.arange(1000.0))
        assert loaded["config"] == {"a": [1, None, "x"]}
    assert checkpoint.verify(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]  # nothing left beside it


def test_the_hash_finds_every_kind_of_damage(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(), path)
    raw = path.read_bytes()
    for place in (0, 100, len(raw) // 2, len(raw) - 30, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        assert checkpoint.verify(path)
        with pytest.raises(CheckpointError, match="last.ckpt"):
            checkpoint.read(path)
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        assert checkpoint.verify(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="last.ckpt"):
        checkpoint.read(path)


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(epoch=1), path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.write(content(epoch=2), path)
    monkeypatch.undo()
    assert checkpoint.read(path)["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_values_become_plain():
    class Colour(enum.IntEnum):
        RED = 1

    given = {
        "a": np.float32(0.5),
        "b": Path("x"),
        "c": (np.int64(3), [Colour.RED]),
        "d": np.arange(3),
        "e": torch.Size([2]),
    }
    made = checkpoint.plain(given)
    assert made["a"] == 0.5 and type(made["a"]) is float
    assert made["b"] == "x" and made["c"] == (3, [1]) and type(made["c"][1][0]) is int
    assert torch.equal(made["d"], torch.arange(3)) and made["e"] == (2,)


def test_what_is_not_plain_is_refused_by_its_place():
    with pytest.raises(CheckpointError, match=r"checkpoint\.callbacks\.mine\.0 is a function"):
        checkpoint.plain({"callbacks": {"mine": [lambda: 1]}})


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match=r"bare\.ckpt"):
        checkpoint.read(bare)
    monkeypatch.setattr(checkpoint, "plain", lambda value: value)  # with a hash that fits
    checkpoint.write(content(evil=Malicious()), tmp_path / "hashed.ckpt")
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.read(tmp_path / "hashed.ckpt")
    assert not (tmp_path / "executed").exists()


def test_random_weights_are_never_found(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path)
    checkpoint.write(content(), tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint.find(tmp_path, "best").name == "last.ckpt"
    checkpoint.write(content(), tmp_path / "checkpoints" / "best.ckpt")
    assert checkpoint.find(tmp_path, "best").name == "best.ckpt"
