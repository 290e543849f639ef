import enum
import hashlib
import http.server
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from boltlab.checkpoints import file as checkpoint_file
from boltlab.checkpoints.fetch import fetch
from boltlab.checkpoints.file import CheckpointError
from boltlab.commands import grid
from boltlab.config import overrides
from boltlab.runs import checkpoints
from boltlab.training.load import load

pytestmark = pytest.mark.floats


def content(**more):
    return {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3, **more}


def test_reads_back_what_was_written_and_loads_with_plain_torch(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    checkpoint_file.write(content(config={"a": [1, None, "x"]}), path)
    for loaded in (checkpoint_file.read(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["state_dict"]["weight"], torch.arange(1000.0))
        assert loaded["config"] == {"a": [1, None, "x"]}
    assert checkpoint_file.verify(path) is None
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]  # nothing left beside it


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoint_file.write(content(epoch=1), path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint_file.write(content(epoch=2), path)
    monkeypatch.undo()
    assert checkpoint_file.read(path)["epoch"] == 1
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
    made = checkpoint_file.plain(given)
    assert made["a"] == 0.5 and type(made["a"]) is float
    assert made["b"] == "x" and made["c"] == (3, [1]) and type(made["c"][1][0]) is int
    assert torch.equal(made["d"], torch.arange(3)) and made["e"] == (2,)


def test_what_is_not_plain_is_refused_by_its_place():
    with pytest.raises(CheckpointError, match=r"checkpoint\.callbacks\.mine\.0 is a function"):
        checkpoint_file.plain({"callbacks": {"mine": [lambda: 1]}})


def test_random_weights_are_never_found(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.find(tmp_path)
    checkpoint_file.write(content(), tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoints.find(tmp_path).name == checkpoints.find(tmp_path, "last").name == "last.ckpt"
    with pytest.raises(CheckpointError, match="no best checkpoint: checkpoint=last takes"):
        checkpoints.find(tmp_path, "best")
    checkpoint_file.write(content(), tmp_path / "checkpoints" / "best.ckpt")
    assert checkpoints.find(tmp_path, "best").name == "best.ckpt"


def resumable(step):
    return content(global_step=step, optimizer_states=[], loops={})


def test_training_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoints.newest_good(tmp_path) == (None, [])
    for name, step in {"last": 5, "last-1": 4, "last-2": 3, "best": 9, "b": 2, "a": 10}.items():
        checkpoint_file.write(resumable(step), folder / f"{name}.ckpt")
    checkpoint_file.write(content(global_step=20), folder / "weights.ckpt")
    checkpoint_file.write(content(global_step=20), folder / "last-3.ckpt")
    passed = []
    for name in ("last", "last-1", "last-2", "a", "best", "b"):
        taken, warnings = checkpoints.newest_good(tmp_path)
        assert taken == folder / f"{name}.ckpt"
        assert len(warnings) == len(passed)
        for damaged in passed:
            line = next(line for line in warnings if f"/{damaged}.ckpt " in line)
            assert line.endswith(f" is damaged: its content does not fit its hash; {name}.ckpt is taken instead")
        raw = bytearray(taken.read_bytes())
        raw[len(raw) // 2] ^= 1
        taken.write_bytes(raw)
        passed.append(name)
    with pytest.raises(CheckpointError) as refused:
        checkpoints.newest_good(tmp_path)
    for name in passed:
        assert f"{name}.ckpt is damaged" in str(refused.value)
    assert "weights.ckpt holds weights only" in str(refused.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def server(tmp_path):
    """The http address of the folder `web`."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=folder, **kwargs)

        def log_message(self, *args):
            """Not into the test's output."""

        def send_header(self, keyword, value):  # of this one more is promised than comes
            more = keyword == "Content-Length" and "short" in self.path
            super().send_header(keyword, str(int(value) + 5) if more else value)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_checkpoint_behind_an_address_is_as_little_trusted_as_any_other(tmp_path, server, capsys):
    checkpoint_file.write(content(), tmp_path / "web" / "good file.ckpt")
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "web" / "evil.ckpt")
    (tmp_path / "web" / "raw").write_bytes(pickle.dumps(Evil()))
    path = checkpoints.which_file(f"{server}/good%20file.ckpt?download=1", log_dir=tmp_path / "logs")
    sha256 = hashlib.sha256((tmp_path / "web" / "good file.ckpt").read_bytes()).hexdigest()
    assert path == tmp_path / "logs" / "fetched" / f"good_file-{sha256[:16]}.ckpt"
    assert checkpoint_file.read(path)["epoch"] == 3
    assert "0.0 MB" in capsys.readouterr().out
    for name in ("evil.ckpt", "raw"):
        with pytest.raises(CheckpointError, match=r"It would import .*nothing of it was run"):
            load(f"{server}/{name}", log_dir=tmp_path / "logs")
    assert not (tmp_path / "executed").exists()


def test_files_of_addresses_that_end_alike_stay_apart(tmp_path, server):
    """Also one that the server exchanges: a run that began with the old one, or waits for its turn, keeps it."""
    kept = {}
    for value, place in ((1.0, "a/best.ckpt"), (2.0, "b/best.ckpt"), (3.0, "b/best.ckpt"), (4.0, "c/best.ckpt?run=1")):
        file = tmp_path / "web" / place.partition("?")[0]
        checkpoint_file.write({"state_dict": {"weight": torch.tensor(value)}}, file)
        kept[value] = checkpoints.which_file(f"{server}/{place}", log_dir=tmp_path / "logs")
    for value, path in kept.items():
        assert checkpoint_file.read(path)["state_dict"]["weight"].item() == value
    assert set((tmp_path / "logs" / "fetched").iterdir()) == set(kept.values())


def test_each_job_of_a_grid_begins_with_the_weights_of_its_own_address(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, place in ((1.0, "a"), (2.0, "b")):
        checkpoint_file.write({"state_dict": {"weight": torch.tensor(value)}}, tmp_path / "web" / place / "best.ckpt")
    addresses = ",".join(f"'{server}/{place}/best.ckpt'" for place in "ab")
    jobs = grid._compose_all(overrides.grid(["data=digits", "model=linear", "logger=none", f"init_from={addresses}"]))
    files = [Path(job.config.init_from) for job in jobs]
    assert [checkpoint_file.read(path)["state_dict"]["weight"].item() for path in files] == [1.0, 2.0]


def test_what_cannot_be_fetched_is_named_and_leaves_nothing(tmp_path, server):
    (tmp_path / "web" / "short.ckpt").write_bytes(b"a" * 100)
    for url, why in {
        f"{server}/none.ckpt": "File not found",
        f"{server}/short.ckpt": "ended after 0.0 MB",
        "http://127.0.0.1:1/a.ckpt": "Connection refused",
        "ftp://127.0.0.1/a.ckpt": "no http or https address",
        "file:///etc/passwd": "no http or https address",
        "http://[/a.ckpt": "Invalid IPv6 URL",
    }.items():
        with pytest.raises(CheckpointError) as refused:
            fetch(url, tmp_path / "fetched")
        assert url in str(refused.value) and why in str(refused.value)
    assert not (tmp_path / "fetched").exists() or not list((tmp_path / "fetched").iterdir())
