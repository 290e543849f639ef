import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
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


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A function that calls git in a clone with one commit, which is the one that the code runs from."""
    place = tmp_path / "clone"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("BOLTLAB_PROJECT")

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    Path("old.py").write_text("a = 1\n")
    Path("gone.py").write_text("b = 1\n")
    Path(".gitignore").write_text("ignored.py\n")
    Path(".gitattributes").write_text("*.md diff=other\n")
    Path("note.md").write_text("".join(f"line {i}\n" for i in range(9)))
    Path("weights.bin").write_bytes(bytes(range(256)))
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(place / "old.py"))
    return git


def test_the_patch_holds_new_files_and_leaves_the_index_alone(clone):
    Path("old.py").write_text("a = 2\n")
    Path("new.py").write_text("b = 3\n")
    Path("ignored.py").write_text("c = 4\n")
    Path("deploy").mkdir()
    Path("deploy/id_rsa").write_text("d = 5\n")
    Path("ü b.env").write_text("e = 6\n")
    Path(".env.example").write_text("f = 7\n")
    before = clone("status", "--porcelain")
    found = provenance._state()
    patch, left_out = found.patch.decode(), found.left_out
    assert (found.commit, found.dirty) == (clone("rev-parse", "HEAD").strip(), True)
    assert "+a = 2" in patch and "+b = 3" in patch and "c = 4" not in patch
    assert sorted(left_out) == ["deploy/id_rsa", "ü b.env"]
    assert "d = 5" not in patch and "e = 6" not in patch and "+f = 7" in patch
    assert clone("status", "--porcelain") == before
    clone("add", "-A")
    clone("commit", "-qm", "second")
    assert provenance._state() == runs.Git(clone("rev-parse", "HEAD").strip(), False, b"", ())


STATES = {
    "plain": [],
    "color": ["color.ui=always"],
    "external": ["diff.external=true"],
    "no prefix": ["diff.noprefix=true"],
    "another prefix": ["diff.mnemonicPrefix=true", "diff.srcPrefix=x/"],
    "textconv": ["diff.other.textconv=tr a-z A-Z <"],
    "a driver's command": ["diff.other.command=true"],
    "relative": ["diff.relative=true", "diff.context=0", "diff.renames=copies"],
    "line ends": ["core.safecrlf=true", "core.autocrlf=input"],
    "index": ["core.splitIndex=true", "core.untrackedCache=true"],
    "sparse": [],
    "staged": [],
    "hook": [],
}


@pytest.mark.parametrize("state", STATES)
def test_the_patch_applies_whatever_git_is_set_to(clone, tmp_path, monkeypatch, state):
    """It makes of the commit, in another clone, what stands here; of git's folder nothing changes."""
    if state == "sparse":
        Path("more").mkdir()
        Path("more/f.py").write_text("m = 1\n")
        clone("add", "-A")
        clone("commit", "-qm", "more")
        clone("sparse-checkout", "set", "--cone", "here")
        assert not Path("more").exists()
    for setting in STATES[state]:
        clone("config", *setting.split("=", 1))
    Path("old.py").write_text("a = 1\r\nb = 2\n")
    Path("gone.py").unlink()
    Path("here").mkdir()
    Path("here/é new.py").write_text("c = 3\n")
    Path("note.md").write_text(Path("note.md").read_text().replace("line 4", "line four"))
    Path("weights.bin").write_bytes(bytes(range(255, -1, -1)))
    Path("link").symlink_to("nowhere")
    if state == "staged":  # and changed again
        Path("brief.py").write_text("d = 4\n")
        clone("add", "-A")
        Path("brief.py").unlink()
        Path("old.py").write_text("a = 5\n")
    if state == "hook":  # starts the training in another clone
        monkeypatch.setenv("GIT_DIR", ".git")
        monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other"))
        monkeypatch.setenv("GIT_EXTERNAL_DIFF", "true")
        monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    kept = {path: path.is_dir() or path.read_bytes() for path in Path(".git").rglob("*")}
    found = provenance._state()
    assert (found.problem, found.left_out) == (None, ())
    assert {path: path.is_dir() or path.read_bytes() for path in Path(".git").rglob("*")} == kept
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS"):
        monkeypatch.delenv(name, raising=False)

    other = tmp_path / "other"
    clone("clone", "-q", "--no-local", ".", str(other))
    (tmp_path / "git.patch").write_bytes(found.patch)
    clone("-C", str(other), "apply", str(tmp_path / "git.patch"))

    def content(folder):
        files = [path for path in folder.rglob("*") if ".git" not in path.parts and not path.is_dir()]
        return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in files}

    expected = content(Path())
    if state == "sparse":
        expected |= {"more/f.py": b"m = 1\n"}
    if state == "line ends":
        expected["old.py"] = b"a = 1\nb = 2\n"
    assert content(other) == expected


def _make_large(name):
    with Path(name).open("ab") as file:
        file.truncate(300_000_000)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _make_large("large.bin"), "large.bin"),
        (lambda: _make_large("weights.bin"), "weights.bin"),
        (lambda: subprocess.run(["git", "init", "-q", "nested"], check=True), "nested/"),
        (lambda: [Path(f"{i}.bin").write_bytes(bytes(800_000 + i)) for i in range(25)], "24.bin"),
        (lambda: Path("ü conf.yaml").write_text('a: 1\npassword: "vB7!kQ2x-Lw9_sTz4"\n'), "ü conf.yaml"),
    ],
    ids=["large", "large and committed", "a clone without a commit", "many", "a secret within"],
)
def test_what_is_no_part_of_the_patch_is_named_and_not_read(clone, monkeypatch, make, expected):
    Path("old.py").write_text("a = 2\n")
    make()
    before = sum(path.stat().st_size for path in Path(".git").rglob("*"))
    found = provenance._state()
    assert found.left_out == (expected,) and found.problem is None
    assert b"+a = 2" in found.patch and b"large" not in found.patch
    assert sum(path.stat().st_size for path in Path(".git").rglob("*")) == before


def test_git_that_refuses_is_told_once(clone, tmp_path, monkeypatch):
    Path("old.py").write_text("a = 2\n")
    commit = clone("rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = provenance._state()
    assert (found.commit, found.patch) == (None, b"") and "dubious ownership" in found.problem
    assert f"git config --global --add safe.directory {Path.cwd()}" in found.problem
    answer = Future()
    answer.set_result(found)
    with pytest.warns(UserWarning, match="commit is not recorded.*dubious ownership"):
        runs.prepare(tmp_path / "run", OmegaConf.create({"run_dir": None, "data": {}}), [], answer)
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    clone("config", "filter.none.clean", "false")
    clone("config", "filter.none.required", "true")
    Path(".gitattributes").write_text("*.py filter=none\n")
    Path("old.py").write_text("a = 30\n")
    found = provenance._state()
    assert (found.commit, found.dirty, found.patch) == (commit, True, b"") and "clean filter" in found.problem


def test_git_is_asked_in_the_background_of_the_state_at_that_time(tmp_path, monkeypatch):
    asked = []

    def git(*arguments, **variables):
        asked.append(threading.current_thread() is threading.main_thread())
        return b"# branch.oid abc\0"

    monkeypatch.setattr(provenance, "_git", git)
    answer = runs.ask_git()
    assert answer.result(60) == runs.Git("abc", False, b"")
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


@pytest.mark.parametrize("left", ["", '{"status": "run', "\0" * 300], ids=["empty", "in part", "zeros"])
def test_a_summary_that_a_power_cut_has_damaged_is_rebuilt(tmp_path, capsys, left):
    older, newer = make(tmp_path, "lenet_bn"), make(tmp_path, "a-b")
    started = runs.read_summary(newer)["started"]
    os.utime(older / ".run", (started - 90, started - 90))  # a minute and a half before
    kept = older.rename(older.with_name("2020-05-06_07-08-09_lenet_bn-a01234"))
    for folder in (kept, newer):
        (folder / "summary.json").write_text(left)
    assert list(runs.folders(tmp_path)) == [newer, kept]
    found = {folder: runs.read_summary(folder) for folder in (kept, newer)}
    assert {found[kept]["name"], found[newer]["name"]} == {"lenet_bn", "a-b"}
    assert time.strftime("%Y %m %d %H %M %S", time.localtime(found[kept]["started"])) == "2020 05 06 07 08 09"
    assert abs(found[newer]["started"] - started) < 2
    assert runs.status(found[kept], kept).resumable
    assert capsys.readouterr().err.count("summary.json is damaged") == 2
    runs.write_summary(kept, status="finished")
    assert json.loads((kept / "summary.json").read_text())["name"] == "lenet_bn"


def test_a_broken_summary_is_no_crash(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "run')
    assert runs.read_summary(tmp_path) == {}
    assert runs.status({}) == "unknown"


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_what_a_run_is_known_by_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, name):
    """A file that is renamed before its content is written is empty after a power cut."""
    written, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (written.append(os.fstat(file).st_ino), fsync(file)))
    unsynced = []

    def checked(path, target):
        if Path(target).name == name and path.stat().st_ino not in written:
            unsynced.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", checked)
    make(tmp_path)
    assert written and not unsynced


def test_the_id_of_a_run_is_read_as_text():
    for number in range(40):
        name = runs.new_folder("logs", "train", f"n{number}").name[-6:]
        assert yaml.safe_load(name) == name
        assert not name[0].isdigit()


def test_the_reason_of_a_config_names_its_mistakes():
    error = ConfigError([Mistake("trainer.max_epochs=ten", "takes int"), Mistake("data", "is missing")])
    assert runs.reason(error) == "trainer.max_epochs=ten: takes int; data: is missing"
    assert runs.reason(ValueError("first\nsecond")) == "ValueError: first"
