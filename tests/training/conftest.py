"""Plain LightningModules and data modules (`zoo`), trained, killed and resumed by command."""

import sys
from pathlib import Path

import pytest
from training.rows import ZOO
from warm import FORKED, only_run


@pytest.fixture
def run(warm, tmp_path):
    """Runs `boltlab` in a folder of its own below the test's: (the finished child, its only run folder; None where what
    was refused has left none)."""

    def go(name, *arguments, before="", code=0, two=False):
        (tmp_path / name).mkdir(exist_ok=True)
        child = warm(*arguments, folder=tmp_path / name, before=ZOO + (FORKED if two else "") + before).wait()
        assert code in (None, child.code), (child.code, child.stdout[-1000:], child.stderr[-5000:])
        logs = tmp_path / name / "logs"
        return child, None if code and not any(logs.glob("train/*")) else only_run(logs)

    return go


@pytest.fixture
def inside(boltlab, monkeypatch):
    """Runs `boltlab` in this process, the zoo's modules trusted: (exit code, stdout, stderr)."""
    from boltlab.config import trust

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(trust, "PACKAGES", (*trust.PACKAGES, "zoo"))
    yield boltlab
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]
