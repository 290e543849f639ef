"""`boltlab new`: what it writes, and that a wheel makes a project that trains, is tested, and outlives an upgrade."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from waiting import HANG, until
from warm import differences, outcome

from boltlab.commands import new

REPOSITORY = Path(__file__).parents[2]


def committed(*below):
    command = ["git", "-c", "safe.directory=*", "ls-files", *below]  # whoever owns the clone
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return names.stdout.splitlines()


def test_a_project_is_this_repositorys_files_under_its_own_name(boltlab, tmp_path):
    assert boltlab("new", "work/my-cells")[0] == 0
    root = tmp_path / "work" / "my-cells"
    assert (root / ".git").is_dir() and (root / "logs" / ".gitkeep").is_file()
    for name in committed("src/project", "configs", *new.SHARED):
        path = root / name.replace("src/project", "src/my_cells").replace("tests/project", "tests")
        text = (REPOSITORY / name).read_text().replace("src/project", "src/my_cells")
        for part in ("models", "data", "callbacks"):
            text = re.sub(rf"(?<![\w.])project\.{part}(?!\w)", f"my_cells.{part}", text)
        assert path.read_text() == text.replace("project: boltlab\n", "project: my_cells\n"), name
        assert os.access(path, os.X_OK) == os.access(REPOSITORY / name, os.X_OK)
    written = [path for path in root.rglob("*") if path.is_file() and ".git" not in path.relative_to(root).parts[:1]]
    assert not [path for path in written if re.search(r"@(package|engine)@|\bproject\.models", path.read_text())]
    table = tomllib.loads((root / "pyproject.toml").read_text())
    assert table["tool"]["boltlab"] == {"package": "my_cells"} and table["project"]["name"] == "my_cells"
    assert table["project"]["dependencies"] == [f"boltlab @ {REPOSITORY.as_uri()}"]
    for check in (["check"], ["format", "--check"]):  # its own order of imports, whatever its name
        subprocess.run([sys.executable, "-m", "ruff", *check, "--no-cache", "."], cwd=root, check=True)
    done = subprocess.run(["make", "-n", "train", "test", "lint"], cwd=root, capture_output=True, text=True, check=True)
    assert "-m boltlab train" in done.stdout and "-m pytest" in done.stdout


REFUSED = {
    ("full",): (1, "full is not empty"),
    ("full/file",): (1, "full/file is not empty"),
    ("a", "--package", "2cells"): (2, "'2cells'|2cells\n      is no name"),
    ("a", "--package=class"): (2, "is no name of a Python package"),
    ("a", "--package=numpy"): (2, "can be imported already"),
    ("json",): (2, "can be imported already"),
    (): (2, "required: folder"),
    ("a", "b"): (2, "unrecognized arguments: b"),
    ("a", "--force"): (2, "unrecognized arguments: --force"),
}


@pytest.mark.parametrize("given", REFUSED, ids=" ".join)
def test_what_cannot_be_made_is_said_and_nothing_is_written(boltlab, tmp_path, given):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, out, err = boltlab("new", *given)
    assert code == REFUSED[given][0] and re.search(REFUSED[given][1], err) and not out
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ({"url": "file:///a/boltlab", "dir_info": {"editable": True}}, "boltlab @ file:///a/boltlab"),
        ({"url": "https://a.b/c.whl", "archive_info": {}}, "boltlab @ https://a.b/c.whl"),
        (
            {"url": "https://a.b/c.git", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            "boltlab @ git+https://a.b/c.git@12ab",
        ),
        (None, "boltlab==0.1.0"),
    ],
)
def test_the_engine_is_named_as_it_was_installed(monkeypatch, said, needed):
    class Installed:
        def read_text(self, name):
            return said and json.dumps(said)

    monkeypatch.setattr(new, "distribution", lambda _: Installed())
    assert new.engine() == needed


@pytest.fixture
def wheel(tmp_path):
    """Builds a wheel of the committed files, of any version."""
    tree = tmp_path / "engine"
    for name in committed():
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)

    def build(version):
        path = tree / "src" / "boltlab" / "__init__.py"
        path.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', path.read_text()))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheels")]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
        return tmp_path / "wheels" / f"boltlab-{version}-py3-none-any.whl"

    return build


@pytest.fixture
def environment(tmp_path):
    """A Python environment that shares all packages with this one but boltlab: (its bin, install)."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read

    def install(*what):
        uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
        command = [*uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, *map(str, what)], check=True, env=plain())

    return python.parent, install


def plain():
    """The variables of a user: nothing of this test's, and offline."""
    ours = ("BOLTLAB", "COV", "PYTEST", "PYTHONPATH", "WANDB")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "WANDB_MODE": "offline", "UV_OFFLINE": "1"}


@pytest.mark.slow
def test_a_wheel_makes_a_project_that_trains_and_outlives_an_upgrade(wheel, environment, tmp_path):
    first, second = wheel("0.1.0"), wheel("0.2.0")
    with zipfile.ZipFile(first) as archive:
        carried = {name.removeprefix("boltlab/template/") for name in archive.namelist() if "/template/" in name}
    assert set(committed(*new.SHARED)) <= carried  # src/project, configs and all else that `boltlab new` copies
    scripts, install = environment
    install(first)

    def run(*command, folder=tmp_path / "cells", code=0):
        found = subprocess.run(
            [scripts / command[0], *command[1:]], cwd=folder, env=plain(), capture_output=True, text=True, timeout=HANG
        )
        assert found.returncode == code, (command, found.stdout[-3000:], found.stderr[-3000:])
        return found.stdout + found.stderr

    assert "boltlab new" in run("boltlab", "train", folder=tmp_path, code=1)  # here is no project
    run("boltlab", "new", "cells", folder=tmp_path)
    assert f'"boltlab @ {first.as_uri()}"' in (tmp_path / "cells" / "pyproject.toml").read_text()
    install("-e", tmp_path / "cells")

    train = ("train", "logger=csv", "trainer.max_epochs=6", "model=mlp", "callbacks=[best,last]")
    run("boltlab", *train, "log_dir=whole")
    running = subprocess.Popen([scripts / "boltlab", *train], cwd=tmp_path / "cells", env=plain())
    until(lambda: list((tmp_path / "cells" / "logs" / "train").glob("*/checkpoints/last.ckpt")))
    running.send_signal(signal.SIGTERM)
    assert running.wait(HANG) == 143

    time.sleep(1.1)  # bytecode of the same second and size would be taken for that of the new version
    install("--upgrade", second)
    assert run("boltlab", "--version").strip() == "boltlab 0.2.0"
    run("boltlab", "train", "resume=latest")
    (stopped,), (whole,) = ((tmp_path / "cells" / name / "train").iterdir() for name in ("logs", "whole"))
    assert not differences(outcome(stopped), outcome(whole))
    known = json.loads((stopped / "environment.json").read_text())
    assert known["project"] == {"name": "cells", "package": "cells", "version": "0.1.0"}
    run("boltlab", "eval", f"run={stopped}", folder=tmp_path)  # needs no project, only the installed package
    assert " passed" in run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
