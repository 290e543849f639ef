"""Worker processes that die, hang or cannot send a batch end the run, with the cure; signals are heard meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from warm import differences, only_run, outcome

from boltlab import runs
from boltlab.data.watch import watch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc and /dev/shm"),
]

QUICK = ("data=digits", "model=linear", "logger=none", "callbacks=[best,last]", "test=false")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.max_epochs=2", "scheduler=constant")
QUICK += ("trainer.num_sanity_val_steps=0", "data_fingerprint=none")
OURS = ("augment=randaugment", "data.num_workers=2", "data.batch_size=32")

# What happens in the first process of a run's loaders that calls it; where NO_FAULT is set, nothing.
HAPPENS = """
import multiprocessing, os, signal, time
from pathlib import Path

def happens(kind):
    if "NO_FAULT" in os.environ or Path("happened").exists() or multiprocessing.parent_process() is None:
        return
    Path("happened").write_text(str(os.getpid()))
    if kind == "sleep":
        time.sleep(600)
    if kind == "slow":
        time.sleep(3)
    if kind == "raise":
        raise ConnectionResetError("the server is gone")
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
"""
# A data module of somebody's own: plain Lightning, plain DataLoaders of 64 rows, in batches of 4.
OWN = """
import os
import torch, lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset
from happens import happens

class Rows(Dataset):
    def __init__(self, at, kind):
        self.at, self.kind, self.labels = at, kind, torch.arange(64) % 2

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == self.at:
            happens(self.kind)
        return torch.full((1, 28, 28), index / 64), int(self.labels[index])

def not_shared(rows):
    return torch.cat([x for x, _ in rows])[:, None], torch.tensor([y for _, y in rows])

def cannot_be_pickled(rows):
    return [*not_shared(rows), lambda: None]

def late(worker_id):
    happens("slow")

class Own(pl.LightningDataModule):
    on_load = None

    def __init__(self, split="train", at=40, kind="", options="{}", **others):
        super().__init__()
        self.split, self.at, self.kind, self.options = split, at, kind, {"batch_size": 4, **eval(options)}

    def loader(self, split):
        return DataLoader(Rows(self.at if split == self.split else None, self.kind), num_workers=2, **self.options)

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def dataset(self, split):
        return Rows(None, "")

    def num_train_batches(self):
        return 16

    def _rank_and_world_size(self):
        return 0, 1
"""
# One image of our own data modules, of which each process of the loader has made some batches.
IN_OURS = """
import torchvision.transforms.v2 as v2
from happens import happens

def forward(self, *images, _original=v2.RandAugment.forward):
    forward.images += 1
    if forward.images > {images}:
        happens({kind!r})
    return _original(self, *images)

forward.images = 0
v2.RandAugment.forward = forward
"""


QUICK_GRACE = "import boltlab.data.watch as w; w.GRACE_SECONDS = 0.5\n"
TRUSTED = "import boltlab.config.trust as t\nt.PACKAGES = (*t.PACKAGES, 'own')\n"


@pytest.fixture
def start(warm, tmp_path):  # a `boltlab train` that has 180 s to end in
    (tmp_path / "happens.py").write_text(HAPPENS)
    (tmp_path / "own.py").write_text(OWN)

    def run(*arguments, before="", **environment):
        path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        child = warm("train", *arguments, before=path + before, **environment)
        timer, wait = threading.Timer(180, child.send, (signal.SIGKILL,)), child.wait

        def ended():
            try:
                return wait()
            finally:
                timer.cancel()

        timer.daemon, child.wait = True, ended
        timer.start()
        return child

    return run


def own(**arguments):
    return (*QUICK, "data._target_=own.Own", *(f"++data.{key}={value}" for key, value in arguments.items()))


def faulty(kind, where):
    """Arguments, and what runs before them: `kind` happens in our own loader, or in one of plain Lightning."""
    if where == "ours":
        return (*QUICK, *OURS), IN_OURS.format(kind=kind, images=100)
    return own(split=where, kind=kind), ""


def nothing_is_left(child):
    def processes():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == child.pid and fields[0] != "Z":  # its session
                    yield stat.parent.name, stat.with_name("wchan").read_text()
            except OSError:
                continue

    end = time.monotonic() + 30
    while (left := list(processes())) and time.monotonic() < end:
        time.sleep(0.05)
    print("left:", left)
    return left == []


@pytest.mark.parametrize("where", ["ours", "train", "val"])
def test_a_worker_that_is_killed_ends_the_run(start, where):
    arguments, before = faulty("SIGKILL", where)
    child = start(*arguments, before=before).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    said = child.stderr.splitlines()[-1]
    assert re.match(
        r"boltlab train: DataLoader worker \(pid \d+\) (is killed by signal: Killed|ended .* code -9): ", said
    )
    assert "if memory was full" in said and "data.num_workers=0 reads without worker processes" in said
    summary = json.loads((only_run() / "summary.json").read_text())
    assert summary["status"] == "failed" and "DataLoader worker (pid" in summary["reason"]


IN_A_STEP = """
import multiprocessing, time
from boltlab.callbacks.last import Last

def hook(self, trainer, *arguments, _original=Last.on_train_batch_end):
    if trainer.global_step == 10:
        os.kill(multiprocessing.active_children()[0].pid, 9)
        time.sleep(1)
    _original(self, trainer, *arguments)

Last.on_train_batch_end = hook
"""


def test_a_worker_that_is_killed_during_a_step_ends_the_run_after_it(start):
    child = start(*QUICK, *OURS, before=IN_A_STEP).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    assert child.stderr.splitlines()[-1].startswith("boltlab train: DataLoader worker (pid")
    assert torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 10


@pytest.mark.parametrize(
    ("kind", "where"), [("sleep", "ours"), ("sleep", "train"), ("sleep", "val"), ("SIGSTOP", "train")]
)
def test_a_worker_that_hangs_ends_the_run_after_timeout_seconds(start, kind, where):
    arguments, before = faulty(kind, where)
    child = start(*arguments, "timeout_seconds=2", before=before).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    said = child.stderr.splitlines()[-1]
    assert "no batch came from the 2 worker processes of" in said and "within 2 s" in said
    assert "data.num_workers=0" in said and "a larger timeout_seconds waits longer" in said


def test_a_timeout_of_ones_own_comes_first(start):
    child = start(*own(kind="sleep", options="'{\"timeout\":2}'")).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    said = child.stderr.splitlines()[-1]
    assert "within 2 s" in said and "a larger timeout of its DataLoader waits longer" in said


@pytest.mark.parametrize(
    "slow", [{"at": 40, "options": "'{\"timeout\":60}'"}, {"at": 0}], ids=["its own timeout", "the first batch"]
)
def test_what_may_take_long_may(start, slow):
    child = start(*own(kind="slow", **slow), "timeout_seconds=1").wait()
    assert child.code == 0 and Path("happened").exists(), child.stderr


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "signum", "code"), [("sleep", "SIGINT", 130), ("SIGSTOP", "SIGTERM", 143)])
def test_a_signal_is_heard_while_a_worker_hangs_and_what_was_trained_is_kept(start, kind, signum, code):
    whole = start(*QUICK, *OURS, "log_dir=whole", NO_FAULT="1").wait()
    assert whole.code == 0, whole.stderr
    child = start(*QUICK, *OURS, before=QUICK_GRACE + IN_OURS.format(kind=kind, images=400))
    child.wait_for(Path("happened"))
    child.pause(1)  # until the other process has no batch left
    child.send(getattr(signal, signum))
    assert child.wait().code == code and nothing_is_left(child), child.stderr
    assert child.stderr.splitlines()[-1] == f"boltlab train: stopped by {signum}"
    steps = torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    child = start("resume=latest", NO_FAULT="1").wait()
    assert child.code == 0, child.stderr
    expected = outcome(only_run("whole"))
    assert differences(expected, outcome(only_run())) == []
    assert steps % (expected["global_step"] // 2)  # it was in mid-epoch


LIGHTNINGS = ("+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.5")


@pytest.mark.faults
@pytest.mark.parametrize("ema", [(), ("callbacks=[best,last,ema]", "callbacks.ema.decay=0.5"), LIGHTNINGS])
def test_a_signal_in_a_validation_that_waits_keeps_the_epoch_before_it(start, ema):
    """A moving average has changed places with the weights then."""
    whole = start(*own(), *ema, "log_dir=whole", NO_FAULT="1").wait()
    assert whole.code == 0, whole.stderr
    child = start(*own(split="val", kind="sleep"), *ema, before=QUICK_GRACE)
    child.wait_for(Path("happened"))
    child.pause(1)
    child.send(signal.SIGTERM)
    assert child.wait().code == 143 and nothing_is_left(child), child.stderr
    steps = torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    child = start("resume=latest", before=TRUSTED, NO_FAULT="1").wait()
    assert child.code == 0, child.stderr
    assert steps == 16 and differences(outcome(only_run("whole")), outcome(only_run())) == []


def test_a_signal_to_all_processes_ends_as_one_to_the_run(start):
    """A scheduler sends SIGTERM to the workers too, and they obey at once."""
    child = start(*faulty("sleep", "ours")[0], before=IN_OURS.format(kind="sleep", images=400))
    child.wait_for(Path("happened"))
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait().code == 143 and nothing_is_left(child), child.stderr
    assert child.stderr.splitlines()[-1] == "boltlab train: stopped by SIGTERM"
    steps = torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == runs.read_summary(only_run())["steps"] > 0


@pytest.mark.faults
def test_ctrl_c_in_a_terminal_leaves_the_workers_to_the_run(start, tmp_path):
    """It goes to all processes; those that are spawned hear it as Python does, and the step still needs batches."""
    arguments = own(kind="slow", options='\'{"multiprocessing_context":"spawn"}\'')
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    child = start(*arguments, "trainer.accumulate_grad_batches=16", PYTHONPATH=path)
    child.wait_for(Path("happened"))
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait().code == 130 and nothing_is_left(child), child.stderr
    assert torch.load(only_run() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.faults
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_that_start_when_the_run_is_killed_end_too(start, tmp_path, context):
    options = f'\'{{"worker_init_fn":late,"multiprocessing_context":"{context}"}}\''
    child = start(*own(options=options), PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    child.wait_for(Path("happened"))
    child.send(signal.SIGKILL)
    assert child.wait().code == -9 and nothing_is_left(child)


# Python for `before`: this process alone sees a /dev/shm of that size.
SMALL_SHM = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for failed in (libc.unshare(0x20000), libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None),
               libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size={size}")):
    assert not failed, os.strerror(ctypes.get_errno())
"""


@pytest.fixture(scope="module")
def namespace():
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no mount namespace of one's own: {done.stderr.strip()}")


@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        ("200k", (*QUICK, *OURS, "data.batch_size=256")),
        ("100k", own(options="'{\"batch_size\":16}'")),
        ("100k", own(options='\'{"batch_size":16,"collate_fn":not_shared}\'')),
        ("40k", own()),  # no room for the locks of the queues
    ],
    ids=["ours", "torch's batch", "a batch of one's own", "locks"],
)
def test_shared_memory_that_is_full_ends_the_run(start, size, arguments):
    child = start(*arguments, before=SMALL_SHM.format(size=size)).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    # A worker whose process has ended may still tell that it lost its connection.
    said = next(line for line in child.stderr.splitlines() if line.startswith("boltlab train: "))
    assert said.startswith("boltlab train: shared memory (/dev/shm, 0.") and "data.num_workers=0" in said
    assert "--shm-size=1g" in said and "--ipc=host" in said


def test_what_cannot_be_sent_ends_the_run(start):
    child = start(*own(options="'{\"collate_fn\":cannot_be_pickled}'")).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    assert "Can't pickle" in child.stderr and "sending a batch" in child.stderr


def test_an_error_of_the_data_set_stays_its_own(start):
    child = start(*own(kind="raise")).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    assert child.stderr.rstrip().endswith("ConnectionResetError: the server is gone") and "memory" not in child.stderr


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["SIGKILL", "sleep"])
def test_of_two_processes_the_one_whose_worker_failed_is_named_last(start, kind, tmp_path):
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    child = start(*own(kind=kind), "trainer=ddp", "trainer.devices=2", "timeout_seconds=5", PYTHONPATH=path).wait()
    assert child.code == 1 and nothing_is_left(child), child.stderr
    why = {"SIGKILL": "DataLoader worker .pid", "sleep": "no batch came from the 2 worker processes"}[kind]
    assert re.match(f"(boltlab train: )?rank [01] failed: {why}", child.stderr.splitlines()[-1])


@pytest.mark.faults
def test_max_restarts_goes_on_after_a_worker_that_was_killed(start, tmp_path):
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    child = start(*own(kind="SIGKILL"), "max_restarts=1", PYTHONPATH=path).wait()
    assert child.code == 0 and nothing_is_left(child), child.stderr
    assert child.stderr.rstrip().endswith("restart 1 of 1") and "DataLoader worker (pid" in child.stderr


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_loader_stays_what_it_was():
    class Own(DataLoader):
        """Somebody's."""

        own = 3

    rows = TensorDataset(torch.arange(20))
    for options in ({}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}):
        plain, watched = Own(rows, 3, **options), Own(rows, 3, **options)
        for _ in "12":  # Lightning passes a loader through once for each stage
            assert watch(watched, 5.0) is watched
        assert isinstance(watched, Own) and type(watched).__name__ == "Own" and watched.own == 3
        assert len(watched) == len(plain)
        for _ in "12":
            for (a,), (b,) in zip(plain, watched, strict=True):
                assert torch.equal(a, b)
    assert type(watch(Own(rows), 5.0)) is Own
