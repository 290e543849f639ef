import errno
import hashlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from waiting import HANG

from boltlab.checkpoints import file as checkpoint_file
from boltlab.checkpoints.file import CheckpointError, read, verify, write
from boltlab.checkpoints.pickles import imports


def content(**more):
    return {"state_dict": {"weight": torch.arange(200_000.0)}, "epoch": 3, **more}


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 1 MB; a checkpoint of `content()` takes 0.8 MB of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tiny disk takes root on Linux")
    yield disk
    subprocess.run(["umount", disk], check=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kilobytes_free", [0, 4, 100, 700, 780])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tiny_disk, kilobytes_free):
    write({"state_dict": {}, "epoch": 1}, tiny_disk / "last.ckpt")
    with (tiny_disk / "ballast").open("wb") as file:
        free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
        file.write(b"\0" * (free - 1024 * kilobytes_free))
    with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt: No space left on device"):
        write(content(epoch=2), tiny_disk / "last.ckpt")
    assert read(tiny_disk / "last.ckpt")["epoch"] == 1
    assert names(tiny_disk) == ["ballast", "last.ckpt"]


def test_a_folder_or_disk_that_cannot_take_a_checkpoint_is_found_beforehand(tiny_disk):
    checkpoint_file.check_folder(tiny_disk / "checkpoints", 900_000)
    assert names(tiny_disk / "checkpoints") == []
    with pytest.raises(CheckpointError, match=r"1\.0 MB are free there, one takes 2\.0 MB or more"):
        checkpoint_file.check_folder(tiny_disk / "checkpoints", 2_000_000)
    (tiny_disk / "file").touch()
    with pytest.raises(CheckpointError, match=r"disk/file: File exists"):
        checkpoint_file.check_folder(tiny_disk / "file", 0)


@pytest.fixture
def nobody():
    """What runs in `with nobody():` runs with the rights of an ordinary user."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can take the rights of another user")

    @contextmanager
    def as_nobody():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return as_nobody


def test_a_folder_that_cannot_be_written_and_a_file_that_cannot_be_read_are_named(nobody):
    with tempfile.TemporaryDirectory() as name:  # an ordinary user cannot enter tmp_path at all
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "last.ckpt"
        write(content(), path)
        with nobody():
            with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt: Permission denied"):
                write(content(epoch=4), path)
            with pytest.raises(CheckpointError, match=r"cannot be written to .*: Permission denied"):
                checkpoint_file.check_folder(folder, 0)
            assert read(path)["epoch"] == 3
        assert names(folder) == ["last.ckpt"]
        path.chmod(0o600)
        with nobody():
            assert verify(path) == "cannot be read: Permission denied"
            with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*last\.ckpt: Permission denied"):
                read(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux has a file whose reading fails")
def test_a_read_error_of_the_disk_is_told_by_name(tmp_path):
    path = tmp_path / "last.ckpt"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*last\.ckpt: (Input/output|Invalid)"):
        read(path)
    assert verify(path).startswith("cannot be read: ")


def test_a_read_error_while_tensors_are_loaded_is_told_by_name(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write(content(), path)

    def broken(file, **_):
        try:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as e:
            raise RuntimeError("PytorchStreamReader failed") from e

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*last\.ckpt: Input/output error"):
        read(path)


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    write(content(), tmp_path / "last.ckpt")

    def interrupted(fileno):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(content(epoch=4), tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt")["epoch"] == 3
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kB on Linux")
def test_weights_are_copied_neither_to_write_nor_to_read(tmp_path):
    script = """
        import resource, sys, torch
        from pathlib import Path
        from boltlab.checkpoints.file import read, verify, write

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        path, tensor = Path(sys.argv[1]), torch.ones(32_000_000)
        write({"state_dict": {"small": torch.ones(9)}}, path)  # the first call imports more
        before = peak()
        write({"state_dict": {"large": tensor}}, path)
        print(peak() - before)
        del tensor
        assert verify(path) is None
        read(path)  # in the room that `tensor` left
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(int(line) < 40 for line in done.stdout.split())  # of 128 MB


def test_any_flipped_byte_and_any_cut_is_told(tmp_path):
    path = tmp_path / "last.ckpt"
    write({"state_dict": {"weight": torch.arange(1000.0)}}, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    ends = [0, 1, *range(len(whole) - 75, len(whole))]  # the start of the archive, and its comment with the length
    for place in [*ends, *(draw.randrange(len(whole)) for _ in range(200))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert verify(path), place
    for cut in [0, 1, 71, 72, 73, 74, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:cut])
        assert verify(path), cut
        with pytest.raises(CheckpointError, match=r"last\.ckpt is "):
            read(path)
    path.write_bytes(whole)
    assert verify(path) is None


def test_leftovers_go_and_nothing_else(tmp_path):
    keep = ["last.ckpt", ".hidden", ".last.ckpt", ".last.ckpt.12", "summary.json", "metrics.csv", ".error-0"]
    left = [".last.ckpt.0123abcd", ".trial.0123abcd", ".summary-0123ab", "metrics.csv.new"]
    folders = (tmp_path, tmp_path / "checkpoints")
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for name in keep + left:
            (folder / name).touch()
    (tmp_path / ".folder.ckpt.0123abcd").mkdir()
    assert len(checkpoint_file.clean_leftovers(tmp_path)) == 2 * len(left)
    assert names(tmp_path) == sorted([*keep, "checkpoints", ".folder.ckpt.0123abcd"])
    assert names(tmp_path / "checkpoints") == sorted(keep)
    assert checkpoint_file.clean_leftovers(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- killed while writing

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from boltlab.checkpoints.file import clean_leftovers, read, write

torch.set_num_threads(1)
draw = random.Random(0)

def kills(path, save, load, count):
    def writer(step):
        while True:
            step += 1
            save({"state_dict": {f"w{i}": torch.full((100_000,), float(step)) for i in range(10)}, "step": step}, path)

    step = broken = left = other = 0
    write({"state_dict": {}, "step": 0}, path)
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            writer(step)
        time.sleep(draw.uniform(0.02, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            content = load(path)
            assert content["step"] >= step
            assert all(bool((w == content["step"]).all()) for w in content["state_dict"].values())
            step = content["step"]
        except Exception:
            broken += 1
        left += len(clean_leftovers(path.parent))
        other += len(os.listdir(path.parent)) - 1
    print(broken, left, other, step, len(os.listdir(os.environ["TMPDIR"])))

folder = Path(sys.argv[1])
kills(folder / "whole" / "last.ckpt", write, read, 30)
kills(folder / "straight" / "last.ckpt", torch.save, torch.load, 10)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_instant_leaves_the_last_checkpoint_whole(tmp_path):
    # With TMPDIR on another file system, a file renamed from there would be copied: never whole.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as other_disk:
        command = [sys.executable, "-c", KILLS, str(tmp_path)]
        environment = {**os.environ, "TMPDIR": other_disk}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=True)
    whole, straight = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    broken, left, other, step, elsewhere = whole
    assert (broken, other, elsewhere) == (0, 0, 0)
    assert left and step  # kills hit files that were being written, and some files were finished
    assert straight[0]  # the negative control, written straight to the target: such kills do break a file


# ---------------------------------------------------------------- what is refused


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {Path.cwd() / 'executed'}",))


class Eval:
    def __reduce__(self):
        return (eval, ("open('executed', 'w')",))


def evil_files(folder):
    """Malicious files in every format that unpickling reads."""
    value = {"state_dict": {"weight": torch.ones(3)}, "a": Evil(), "b": Eval()}
    for protocol in (0, 2, 4):
        (folder / f"raw{protocol}.ckpt").write_bytes(pickle.dumps({"a": Evil(), "b": Eval()}, protocol=protocol))
        torch.save(value, folder / f"zip{protocol}.ckpt", pickle_protocol=max(2, protocol))
        torch.save(
            value,
            folder / f"legacy{protocol}.ckpt",
            pickle_protocol=max(2, protocol),
            _use_new_zipfile_serialization=False,
        )
    return sorted(folder.glob("*.ckpt"))


def test_malicious_files_are_refused_with_what_they_would_import(tmp_path):
    for path in evil_files(tmp_path):
        with pytest.raises(CheckpointError) as refused:
            read(path)
        text = str(refused.value)
        assert path.name in text and "posix.system" in text.replace("nt.system", "posix.system"), text
        assert "builtins.eval" in text or "__builtin__.eval" in text, text
        assert "trust=true" in text and "nothing of it was run" in text
        with pytest.raises(CheckpointError, match="system"):
            checkpoint_file.read_foreign(path)
        assert verify(path)
    assert not (tmp_path / "executed").exists()
    assert len(evil_files(tmp_path)) == 9


def test_a_malicious_file_with_a_hash_that_fits_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "plain", lambda value: value)
    write(content(evil=Evil()), tmp_path / "hashed.ckpt")
    assert verify(tmp_path / "hashed.ckpt") is None
    with pytest.raises(
        CheckpointError, match=r"hashed\.ckpt holds more than tensors .*: refused. It would import posix\.system;"
    ):
        read(tmp_path / "hashed.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("hashed", [False, True])
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_not_unpacked(tmp_path, hashed):
    path = tmp_path / "best.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as inner:
        for _ in range(200):
            inner.write(bytes(1 << 20))
    if hashed:  # as anybody can
        packed = path.read_bytes()[:-2]
        digest = hashlib.sha256(packed + b"\0\0").hexdigest().encode()
        path.write_bytes(packed + struct.pack("<H", 71) + b"sha256:" + digest)
    tracemalloc.start()
    try:
        for reader in (read, checkpoint_file.read_foreign):
            with pytest.raises(CheckpointError, match=r"unpacks to 209\.7 MB, as nothing does that torch.save writes"):
                reader(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files here")
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "best.ckpt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    for reader in (read, checkpoint_file.read_foreign):
        with pytest.raises(CheckpointError, match=r"best\.ckpt: this is a pipe or a device"):
            reader(path)
    assert "this is a pipe or a device" in verify(path)


def test_what_is_harmless_imports_nothing(tmp_path):
    for zipped in (True, False):
        torch.save(content(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        assert imports(io.BytesIO((tmp_path / "a.ckpt").read_bytes())) == []
    # No bytes drawn anew: one draw in some hundred begins with the opcode of an import.
    for raw in (b"", b"<html>", b"PK\3\4", bytes(range(256))):
        assert imports(io.BytesIO(raw)) == []


def test_a_name_that_is_fetched_from_the_memo_is_found():
    evil = pickle.dumps(["os", "system"], protocol=4)
    start = evil.index(b"\x8c\x02os")
    body = evil[start : evil.index(b"e.", start)]  # both texts, each put into the memo
    memo = body + b"h\x01h\x02\x93."  # BINGET 1, BINGET 2, STACK_GLOBAL
    assert imports(io.BytesIO(b"\x80\x04]\x94(" + memo)) == ["os.system"]


def test_odd_files_are_errors_of_one_line(tmp_path):
    torch.save([1], tmp_path / "list.ckpt")
    with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as archive:
        archive.writestr("a.txt", "a")
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    for path in tmp_path.glob("*.ckpt"):
        with pytest.raises(CheckpointError, match=path.name) as refused:
            read(path)
        assert "\n" not in str(refused.value)
        if path.name != "list.ckpt":
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint_file.read_foreign(path)
