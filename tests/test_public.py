"""The public names: six packages, each name documented and imported when it is asked for; a project uses no others."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("boltlab", "boltlab.callbacks", "boltlab.data", "boltlab.metrics", "boltlab.optim", "boltlab.testing")
PROJECT = Path(__file__).parents[1] / "src" / "project"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        thing = getattr(module, name)
        assert name == "Split" or (thing.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="'nothing'"):
        module.nothing  # noqa: B018


def test_the_packages_are_imported_without_what_they_name():
    code = f"import sys, {', '.join(PACKAGES[:-1])}; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_project_imports_public_names_only():
    for path in sorted(PROJECT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "boltlab":
                names = {alias.name for alias in node.names}
                known = set(importlib.import_module(node.module).__all__) if node.module in PACKAGES else set()
                assert names <= known, (path.name, node.module, names)
