"""A disk that is full, or a folder that cannot be written, ends a run with one line and costs no older checkpoint."""

import os
import subprocess

import pytest

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file

QUICK = ["model=linear", "logger=csv", "test=false", "~callbacks.progress", "~callbacks.summary"]


@pytest.fixture
def disk(tmp_path):
    """Makes a disk of so many kB."""
    made = []

    def make(kilobytes):
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tiny disk takes root on Linux")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536) == 65536:
                pass
            while file.write(b"\0"):
                pass
        except OSError:
            pass


def test_a_folder_that_cannot_hold_checkpoints_is_found_before_the_first_epoch(boltlab, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = boltlab("train", *QUICK, "trainer.max_epochs=1", f"callbacks.last.dirpath={tmp_path}/file/inside")
    assert code == 1
    assert err == f"boltlab train: checkpoints cannot be written to {tmp_path}/file/inside: Not a directory\n"
    folder = runs.find("latest", "logs")
    assert runs.read_summary(folder)["status"] == "failed"
    assert not (folder / "metrics.csv").exists() and not list(folder.rglob("*.ckpt"))


def test_a_disk_that_is_full_before_a_run_ends_it_before_the_first_epoch(boltlab, disk, monkeypatch):
    # A patch of this clone may fill it alone.
    monkeypatch.setattr(runs.provenance, "_state", lambda: runs.Git(None, None, b""))
    small = disk(40)
    code, _, err = boltlab("train", *QUICK, "model=mlp", "trainer.max_epochs=1", f"log_dir={small}")
    assert code == 1 and err.count("\n") == 1
    assert "MB are free there, one takes" in err
    assert runs.read_summary(runs.find("latest", small))["status"] == "failed"
    none = disk(8)
    code, _, err = boltlab("train", *QUICK, "trainer.max_epochs=1", f"log_dir={none}")
    assert code == 1 and err.count("\n") == 1
    assert "No space left on device" in err


def test_a_disk_that_fills_up_during_a_run_costs_no_older_checkpoint(boltlab, disk, monkeypatch):
    place = disk(2000)
    write, written = checkpoint_file.write, []

    def write_until_full(content, path):
        written.append(path.name)
        if len(written) == 5:
            fill(place)
        write(content, path)

    monkeypatch.setattr("boltlab.checkpoints.io.write", write_until_full)
    code, _, err = boltlab("train", *QUICK, "trainer.max_epochs=9", f"log_dir={place}")
    assert code == 1 and err.count("\n") == 1, err  # one line, also where the summary finds no room
    assert f"{written[-1]}: No space left on device; what stood there is untouched" in err
    folder = runs.find("latest", place)
    assert sorted(os.listdir(folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    for name in ("best", "last"):
        assert checkpoint_file.read(folder / "checkpoints" / f"{name}.ckpt")["global_step"] >= 21
    assert not list(folder.glob(".summary-*"))


def test_metrics_that_find_no_room_end_a_run_with_one_line(boltlab, disk, monkeypatch):
    from boltlab.loggers.csv import CSVLogger

    place = disk(2000)
    log, calls = CSVLogger.log_metrics, []

    def log_until_full(self, metrics, step=None):
        calls.append(step)
        if len(calls) == 3:
            fill(place)
        log(self, {**metrics, **{f"much_{i}": float(i) for i in range(500)}} if len(calls) >= 3 else metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", log_until_full)
    code, _, err = boltlab("train", *QUICK, "trainer.max_epochs=9", f"log_dir={place}")
    assert code == 1
    assert err.splitlines()[-1].endswith("metrics.csv: No space left on device") and "Traceback" not in err
    assert not list(runs.find("latest", place).glob("metrics.csv.new"))
