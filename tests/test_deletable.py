"""Every optional feature of docs/features.md goes away by deleting its files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([^|]+?) \| (`[^|]+`) \|", re.MULTILINE)
FEATURES = {
    name: re.findall(r"`([^`]+)`", files)
    for name, files in ROW.findall((REPOSITORY / "docs" / "features.md").read_text(encoding="utf-8"))
}
GROUPS = [list(FEATURES)[start::4] for start in range(4)]

IMPORT = """
import importlib, pkgutil
import boltlab, project
for package in (boltlab, project):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__") and ".testing" not in module.name:
            importlib.import_module(module.name)
"""
COMPOSE = """
from boltlab.config.compose import compose
from boltlab.config.project import options
with options("train", ["trusted=[project]"]):
    print("callbacks:", *compose("train", ["logger=csv"]).config.callbacks)
"""


def without(features, tmp_path):
    """A copy of the tree without the files of these features; runs a Python command in it: its output."""
    tree = tmp_path / "tree"
    hidden = shutil.ignore_patterns("__pycache__", "local")
    for name in ("src", "configs"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=hidden)
    shutil.copy(REPOSITORY / "pyproject.toml", tree)
    for path in (path for name in features for path in FEATURES[name]):
        assert (REPOSITORY / path).is_file(), path
        (tree / path).unlink(missing_ok=True)  # tests are not copied

    def run(*command):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        environment = {**kept, "PYTHONPATH": str(tree / "src"), "BOLTLAB_PROJECT": str(tree)}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


def test_the_table_names_each_file_once_and_no_module_names_it():
    files = [path for paths in FEATURES.values() for path in paths]
    assert len(FEATURES) > 15 and len(files) == len(set(files))
    for paths in FEATURES.values():
        others = [path for path in (REPOSITORY / "src").rglob("*.py") if str(path.relative_to(REPOSITORY)) not in paths]
        for file in [file for file in paths if file.startswith("src/") and file.endswith(".py")]:
            package, _, name = file.removeprefix("src/").removesuffix(".py").replace("/", ".").rpartition(".")
            imports = re.compile(rf"(from|import) {package}\.{name}\b|from {package} import [^\n]*\b{name}\b")
            for path in others:
                assert not imports.search(path.read_text(encoding="utf-8")), (path, name)


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_without_it_a_config_composes(feature, tmp_path):
    said = without([feature], tmp_path)("-c", COMPOSE)
    name = Path(FEATURES[feature][0]).stem
    assert name not in said.partition("callbacks:")[2].split()


@pytest.mark.slow
@pytest.mark.parametrize("features", GROUPS, ids=" ".join)
def test_without_some_of_them_a_run_trains_and_is_evaluated(features, tmp_path):
    run = without(features, tmp_path)
    run("-W", "ignore", "-c", IMPORT)
    given = ("trusted=[project]", "logger=csv", "trainer.max_epochs=1", "data.max_samples=300", "model=mlp")
    assert "test_acc" in run("-m", "boltlab", "train", *given)
    assert "val_acc" in run("-m", "boltlab", "eval", "run=latest", "split=val", "trusted=[project]")
    run("-m", "boltlab", "runs")
