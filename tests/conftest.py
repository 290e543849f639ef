"""Every test runs in an empty folder of its own, offline, with one thread or as many as BOLTLAB_TEST_THREADS says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG

# Before torch is imported: several test processes share the cores, and waiting threads would slow all of them.
threads = os.environ.get("BOLTLAB_TEST_THREADS", "1")
# Their folders lie outside of the repository, whose project is the one that they mean.
REPOSITORY = Path(__file__).resolve().parents[1]
os.environ["BOLTLAB_PROJECT"] = str(REPOSITORY)
os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, WANDB_MODE="offline", WANDB_SILENT="true")
for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "BOLTLAB_TRACEBACK", "HYDRA_FULL_ERROR"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of the project's config folder, which stands for it in this process."""
    from boltlab.config import project

    folder = Path(shutil.copytree(REPOSITORY / "configs", tmp_path / "configs"))
    monkeypatch.setattr(project, "config_dirs", lambda: [folder])
    return folder


@pytest.fixture
def boltlab(capsys):
    """Runs `boltlab <arguments>` in this process: (exit code, stdout, stderr)."""
    from boltlab.__main__ import main

    def run(*arguments):
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def boltlab_process(tmp_path):
    """Runs `boltlab <arguments>` as a command of its own: the finished process with its text."""

    # What an earlier test's W&B runs have left in this process: a folder that is not ours.
    leftovers = ("WANDB_DATA_DIR", "WANDB_ARTIFACT", "WANDB_RUN")

    def run(*arguments, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(leftovers)}
        return subprocess.run(
            [sys.executable, "-m", "boltlab", *arguments],
            cwd=tmp_path,
            env={**kept, **environment},
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def warm_server():
    from warm import SERVER  # which imports torch

    # Its children end without saving what coverage counts, and W&B's service of one test is none of another's.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "WANDB_SERVICE", "_WANDB"))}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield server
    server.stdin.close()
    server.wait(HANG)
    server.stdout.close()


@pytest.fixture
def warm(warm_server, tmp_path):
    """Starts `boltlab <arguments>`: a Child."""

    from warm import Child

    def start(*arguments, before="", folder=tmp_path, **environment):
        return Child(warm_server, arguments, folder, before, environment)

    return start
