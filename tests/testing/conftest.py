"""A project with a test file of `boltlab.testing`'s classes, in which a pytest of its own runs."""

import shutil
import sys
from pathlib import Path

import pytest
from plain.conftest import cells  # noqa: F401

CLASSES = """
import boltlab.testing

class TestModule(boltlab.testing.ModuleTests):
    config = "{config}"

class TestData(boltlab.testing.DataModuleTests):
    config = "{config}"
"""
CONFIG = "model=tested data=tested callbacks=last monitor=val_loss mode=min"


class Recorder:
    """(outcome, message) of each test by its name, without the class."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            text = report.longrepr[2] if report.skipped else str(report.longrepr or "")
            self.found[report.nodeid.rpartition("::")[2]] = report.outcome, text


@pytest.fixture
def checks(cells, monkeypatch):  # noqa: F811
    """Runs the checks on modules and data modules of `cells`: the outcomes of one of the two classes, and messages."""
    shutil.copy(Path(__file__).parent / "project" / "broken.py", cells / "src" / "cells")
    (cells / "tests").mkdir(exist_ok=True)
    (cells / "pytest.ini").write_text("[pytest]\n")
    file = cells / "tests" / "test_cells.py"

    def run(which, model="cells.models.Forecaster", data="cells.data.Series", more="", **environment):
        for group, target in (("model", model), ("data", data)):
            (cells / "configs" / group / "tested.yaml").write_text(f"_target_: {target}\n")
        file.write_text(CLASSES.format(config=f"{CONFIG} {more}"))
        for name in [name for name in sys.modules if name.endswith("test_cells")]:
            del sys.modules[name]
        for name, value in {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}.items():
            monkeypatch.setenv(name, value)
        recorder = Recorder()
        arguments = ["-q", "-W", "error", "-c", str(cells / "pytest.ini"), "--import-mode=importlib"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
        pytest.main([*arguments, f"{file}::{which}"], plugins=[recorder])
        for name in environment:
            monkeypatch.delenv(name)
        return recorder.found

    yield run
    shutil.rmtree(cells / "tests")
