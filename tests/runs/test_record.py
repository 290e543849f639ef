import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from waiting import HANG

from boltlab import runs
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.runs import provenance


def make(log_dir, name="mlp", **summary):
    folder = runs.new_folder(log_dir, "train", name)
    runs.prepare(folder, OmegaConf.create({"run_dir": None, "seed": 1, "out": "${run_dir}/x", "data": {}}), ["seed=1"])
    runs.write_summary(folder, **summary)
    return folder


def test_many_starts_in_one_second_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: runs.new_folder(tmp_path, "train", "same"), range(200)))
    assert len(set(made)) == 200


START = """
import sys, time
from pathlib import Path
from omegaconf import OmegaConf
from boltlab import runs
from boltlab.runs import record
from boltlab.ground.errors import UserError
record.environment = lambda git: {}
print("ready", flush=True)
sys.stdin.readline()
print(runs.new_folder("logs", "train", "same").name, flush=True)
try:
    runs.prepare(Path("told"), OmegaConf.create({"run_dir": None, "data": {}, "seed": int(sys.argv[1])}), [])
    print(sys.argv[1])
except UserError as e:
    print(e)
"""


def test_eight_processes_at_once_never_share_a_folder_also_when_told_to():
    command, pipes = [sys.executable, "-c", START], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(8)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 8
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()
    made, told = zip(*(p.communicate(timeout=HANG)[0].splitlines() for p in processes), strict=True)
    assert len(set(made)) == 8 and {f.name for f in Path("logs/train").iterdir()} == set(made)
    (winner,) = [text for text in told if text.isdigit()]
    assert sum("holds a run already" in text for text in told) == 7
    assert runs.load_config(Path("told")).seed == int(winner)


def test_a_name_is_made_safe_for_every_file_system(tmp_path):
    folder = runs.new_folder(tmp_path, "train", "a/b c=d, é数:*?")
    assert folder.parent == (tmp_path / "train").resolve()
    assert not set(" /=,:*?") & set(folder.name)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="log_dir="):
        runs.new_folder(tmp_path / "file", "train", "x")


def test_a_run_folder_is_complete_and_survives_being_moved(tmp_path):
    folder = make(tmp_path)
    for name in ("config.yaml", "overrides.yaml", "environment.json", "git.patch", "summary.json"):
        assert (folder / name).is_file(), name
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert environment["python"] == platform.python_version()
    moved = folder.rename(tmp_path / "elsewhere")
    config = runs.load_config(moved)
    assert config.run_dir == str(moved) and config.out == f"{moved}/x" and config.seed == 1
    assert str(folder) not in (moved / "config.yaml").read_text()


def test_the_patch_holds_new_files_and_leaves_the_index_alone(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout

    monkeypatch.delenv("BOLTLAB_PROJECT")
    git("init", "-q")
    (tmp_path / "old.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    (tmp_path / "old.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("b = 3\n")
    (tmp_path / "ignored.py").write_text("c = 4\n")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "id_rsa").write_text("d = 5\n")
    (tmp_path / "ü b.env").write_text("e = 6\n")
    (tmp_path / ".env.example").write_text("f = 7\n")
    before = git("status", "--porcelain")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "old.py"))
    found = provenance._state()
    patch, left_out = found.patch.decode(), found.left_out
    assert (found.commit, found.dirty) == (git("rev-parse", "HEAD").strip(), True)
    assert "+a = 2" in patch and "+b = 3" in patch and "c = 4" not in patch
    assert sorted(left_out) == ["deploy/id_rsa", "ü b.env"]
    assert "d = 5" not in patch and "e = 6" not in patch and "+f = 7" in patch
    assert git("status", "--porcelain") == before
    git("add", "-A")
    git("commit", "-qm", "second")
    assert provenance._state() == runs.Git(git("rev-parse", "HEAD").strip(), False, b"", ())


def test_git_is_asked_in_the_background_of_the_state_at_that_time(tmp_path, monkeypatch):
    asked = []

    def git(*arguments, **variables):
        asked.append(threading.current_thread() is threading.main_thread())
        return b"# branch.oid abc\0? x\0"

    monkeypatch.setattr(provenance, "_git", git)
    answer = runs.ask_git()
    assert answer.result(60) == runs.Git("abc", True, b"# branch.oid abc\0? x\0", ())
    asked_then = len(asked)
    folder = runs.new_folder(tmp_path, "train", "x")
    runs.prepare(folder, OmegaConf.create({"run_dir": None, "data": {}}), [], answer)
    assert json.loads((folder / "environment.json").read_text())["git_commit"] == "abc"
    assert (folder / "git.patch").read_bytes() == answer.result().patch
    assert len(asked) == asked_then and not any(asked)


def test_what_stops_git_from_answering_is_raised_where_the_answer_is_wanted(monkeypatch):
    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(provenance, "_state", fail)
    answer = runs.ask_git()
    with pytest.raises(OSError, match="disk full"):
        answer.result(60)


def test_packages_are_those_that_python_finds():
    found = {d.metadata["Name"]: d.version for d in reversed(list(importlib.metadata.distributions()))}
    assert runs.packages() == found and list(found)


def test_a_folder_in_use_is_refused(tmp_path):
    folder = make(tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        runs.prepare(folder, OmegaConf.create({"run_dir": None, "data": {}}), [])


def test_finds_the_newest_and_by_part_of_a_name(tmp_path):
    first = make(tmp_path, "alpha", started=1.0)
    second = make(tmp_path, "beta", started=2.0)
    job = tmp_path / "train" / "sweep" / "0"
    runs.prepare(job, OmegaConf.create({"run_dir": None, "data": {}}), [])
    runs.write_summary(job, started=1.5)
    assert [f.name for f in runs.folders(tmp_path)] == [second.name, "0", first.name]
    assert runs.find("latest", tmp_path) == second
    assert runs.find("alpha", tmp_path) == first
    assert runs.find(str(first), tmp_path / "other") == first
    with pytest.raises(UserError, match="neither a run folder nor part"):
        runs.find("gamma", tmp_path)
    with pytest.raises(UserError, match="fits 2 runs"):
        runs.find("a-", tmp_path)
    with pytest.raises(UserError, match="no config.yaml"):
        runs.find(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="no run yet"):
        runs.find("latest", tmp_path / "empty")


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    folder = make(tmp_path)
    assert runs.status(runs.read_summary(folder)) == "running"
    assert runs.status({"status": "running", "pid": os.getpid()}) == "running"
    pid = _ended_pid()
    assert runs.status({"status": "running", "pid": pid}) == "killed"
    assert runs.status({"status": "finished", "pid": pid}) == "finished"


def _ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


HOLD = """
import sys, time
from pathlib import Path
from boltlab import runs
from boltlab.runs import provenance
with runs.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of a folder."""
    started = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path, holder):
    folder = make(tmp_path)
    process = holder(folder)
    with (
        pytest.raises(UserError, match=f"{folder.name}.*process {process.pid} on {platform.node()}"),
        runs.lock(folder),
    ):
        pytest.fail("two processes hold one folder")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with runs.lock(folder), pytest.raises(UserError, match=f"process {os.getpid()} "), runs.lock(folder):
        pytest.fail("held twice in one process")
    with runs.lock(folder):
        pass


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_worker_that_outlives_its_process_does_not_keep_the_folder(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    folder, (reader, writer) = make(tmp_path), os.pipe()
    with runs.lock(folder):
        child = os.fork()
        if not child:
            os.read(reader, 1)
            os._exit(0)
    try:
        with runs.lock(folder):
            pass
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)


def test_the_lock_says_whether_a_run_goes_on_also_when_its_pid_is_taken(tmp_path, holder):
    folder = make(tmp_path)
    runs.write_summary(folder, pid=_ended_pid())
    process = holder(folder)
    assert runs.status(runs.read_summary(folder), folder) == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    runs.write_summary(folder, pid=os.getpid())
    assert runs.status(runs.read_summary(folder), folder) == "killed"
    with runs.lock(folder):
        assert runs.status(runs.read_summary(folder), folder) == "running"


def test_a_broken_summary_is_no_crash(tmp_path):
    folder = make(tmp_path)
    (folder / "summary.json").write_text('{"status": "run')
    assert runs.read_summary(folder) == {}
    assert runs.status({}) == "unknown"


def test_the_id_of_a_run_is_read_as_text():
    for number in range(40):
        name = runs.new_folder("logs", "train", f"n{number}").name[-6:]
        assert yaml.safe_load(name) == name
        assert not name[0].isdigit()


def test_the_reason_of_a_config_names_its_mistakes():
    error = ConfigError([Mistake("trainer.max_epochs=ten", "takes int"), Mistake("data", "is missing")])
    assert runs.reason(error) == "trainer.max_epochs=ten: takes int; data: is missing"
    assert runs.reason(ValueError("first\nsecond")) == "ValueError: first"
